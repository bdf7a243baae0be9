"""How long a recovery actor takes from being asked for to its first step, with and without code compiled before.

    python benchmarks/start_up.py 224 3 > benchmarks/results/start_up.json     # case of recover_step.py, warm starts

One unit of one step, in a stage of its own through Ray Data each time, so in a new process: Ray's start of it,
imports, loading the teachers, compiling them or finding compiled code in the node's cache (a fresh one at first), the
step, and the commit of its images. ``eager`` compiles nothing; ``cold`` and then ``warm`` with ``recover.compile``. The
session of Ray stands before; one actor with one torch thread.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from itertools import count

import torch
from recover_step import CASES

from cluster import storage
from cluster.resources import ActorResources, SessionOptions
from cluster.runner import run_ray
from cluster.session import ray_session
from stages.data import DataSpec
from stages.recover.options import RecoverOptions
from stages.recover.speed import has_bf16, processor
from stages.recover.stage import recover_rows, recover_stage
from stages.recover.unit import RecoverUnit
from stages.teachers.build import build_network
from stages.teachers.options import TeacherSpec
from stages.teachers.weights import save_weights


def main(pool: str, rounds: str = "3") -> None:
    case = CASES[pool]
    data = DataSpec(case.size, 3, (0.5,) * 3, (0.25,) * 3, tuple(f"c{i:03d}" for i in range(case.images)))
    cpu = torch.device("cpu")
    found: dict[str, list[float]] = {"eager": [], "cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as root:
        # Of workers, which are told it by the session.
        os.environ["PRISM_CACHE"] = storage.join(root, "cache")
        specs = {}
        for index, arch in enumerate(case.archs):
            weights = storage.join(root, f"{index}.safetensors")
            specs[f"t{index}"] = spec = TeacherSpec(arch=arch, weights=weights)
            save_weights(weights, build_network(spec, case.images, 3, seed=index).state_dict())
        names = list(specs)
        unit = RecoverUnit(
            ipc=0, chunk=0, classes=list(range(case.images)), logit_teachers=names[:1], bn_teachers=names, iterations=1,
            seed=0,
        )  # fmt: skip
        options = RecoverOptions(
            logit_teachers=names[:1], bn_teachers=names, selection="fixed", init="noise",
            precision="bf16" if has_bf16(cpu) else "fp32",
        )  # fmt: skip

        number = count()

        def start(kind: str) -> None:
            out = storage.join(root, kind, str(next(number)))
            wanted = options.model_copy(update={"compile": kind != "eager"})
            stage = recover_stage(out, "", specs, data, wanted, kind, ActorResources(gpus=0, actors=1, threads=1))
            begin = time.perf_counter()
            rows = list(run_ray(recover_rows([unit]), [stage]))
            found[kind].append(time.perf_counter() - begin)
            assert not rows[0]["error"], rows[0]["error"]

        with ray_session(SessionOptions(num_cpus=2, object_store_mb=300)):
            # The first of a session has more to do, whatever it is.
            start("eager")
            found["eager"].clear()
            start("cold")
            for _ in range(int(rounds)):
                start("eager")
                start("warm")
    result = {
        "pool": list(case.archs),
        "size": case.size,
        "images": case.images,
        "precision": options.precision,
        "seconds": {kind: round(statistics.median(values), 1) for kind, values in found.items()},
        "rounds": {kind: [round(value, 1) for value in values] for kind, values in found.items()},
        "environment": {"device": processor(cpu), "cpus": os.cpu_count(), "torch": torch.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
