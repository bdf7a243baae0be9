"""What Ray adds to recovery: the stage through Ray Data with one actor against a bare loop in this process.

    python benchmarks/ray_cost.py > benchmarks/results/ray_cost.json

Units of noise images, 32 px, against three small teachers, one torch thread each way. The bare loop only optimises;
the stage besides keeps its record, encodes images and commits shards. Both take turns. Seconds a unit are those from
the end of one unit to the end of the next, so that the actor is warm; of all turns together the median counts. A unit
of the stage ends when its shard is written: the driver may hear of two at once. Start-up is the time from the call to
the end of the first unit, less what a unit takes.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from placement import DATA, IMAGES, teachers

from cluster import storage
from cluster.resources import ActorResources, SessionOptions
from cluster.runner import run_ray
from cluster.session import ray_session
from stages.device import reuse_memory
from stages.recover.core import recover_unit
from stages.recover.objective import LocalObjective
from stages.recover.options import RecoverOptions
from stages.recover.speed import processor
from stages.recover.stage import recover_rows, recover_stage
from stages.recover.unit import RecoverUnit
from stages.teachers.teacher import load_teacher

CPU = torch.device("cpu")


def ends(done: Iterable[object]) -> list[float]:
    """Seconds from now until each is done."""
    start = time.perf_counter()
    return [time.perf_counter() - start for _ in done]


def each(found: list[float]) -> list[float]:
    """Seconds of each unit but the first."""
    return [end - start for start, end in pairwise(found)]


def main(units: str = "5", steps: str = "25", rounds: str = "5") -> None:
    torch.set_num_threads(1)
    reuse_memory()
    bare: list[float] = []
    rays: list[float] = []
    starts: list[float] = []
    with tempfile.TemporaryDirectory() as root, ray_session(SessionOptions(num_cpus=2, object_store_mb=300)):
        specs = teachers(root)
        names = list(specs)
        work = [
            RecoverUnit(
                ipc=i, chunk=0, classes=list(range(IMAGES)), logit_teachers=names[:1], bn_teachers=names,
                iterations=int(steps), seed=i,
            )
            for i in range(int(units))
        ]  # fmt: skip
        options = RecoverOptions(logit_teachers=names[:1], bn_teachers=names, selection="fixed", init="noise")
        objective = LocalObjective({name: load_teacher(name, spec, DATA, CPU) for name, spec in specs.items()}, options)
        for turn in range(int(rounds)):
            bare += each(ends(recover_unit(unit, None, objective, options, DATA, CPU) for unit in work))
            out = storage.join(root, str(turn))
            resources = ActorResources(actors=1, threads=1)
            stage = recover_stage(out, "", specs, DATA, options, "i", resources)
            begin = time.time()
            list(run_ray(recover_rows(work), [stage]))
            found = sorted(path.stat().st_mtime - begin for path in Path(out, "recovered").glob("*.parquet"))
            assert len(found) == len(work)
            rays += each(found)
            starts.append(found[0] - statistics.median(each(found)))
    result = {
        "seconds_per_unit": {"bare": round(statistics.median(bare), 3), "ray": round(statistics.median(rays), 3)},
        "ratio": round(statistics.median(rays) / statistics.median(bare), 3),
        "start_s": round(statistics.median(starts), 2),
        "units_s": {"bare": [round(s, 3) for s in bare], "ray": [round(s, 3) for s in rays]},
        "units": int(units),
        "steps": int(steps),
        "environment": {"device": processor(CPU), "cpus": os.cpu_count(), "torch": torch.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
