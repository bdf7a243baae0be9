"""What it costs to give every teacher an actor of its own (resources.placement).

    python benchmarks/placement.py > benchmarks/results/placement.json

Recovers units of noise images, 32 px, against three small teachers, in one Ray session: ``colocated``, ``per_teacher``,
and, to tell the cost of separate passes from that of the exchange, all parts in one process. Rounds take turns, the
first unit of each actor is left out, and the fastest unit counts, for the machine may have other work.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from typing import Any

import torch

from cluster import storage
from cluster.resources import ActorResources, SessionOptions
from cluster.runner import run_ray, run_serial
from cluster.session import ray_session
from stages.data import DataSpec
from stages.recover.options import RecoverOptions
from stages.recover.stage import recover_rows, recover_stage
from stages.recover.unit import RecoverUnit
from stages.teachers.build import build_network
from stages.teachers.options import TeacherSpec
from stages.teachers.weights import save_weights

SIZE, IMAGES, STEPS, UNITS, ROUNDS = 32, 20, 12, 3, 2
DATA = DataSpec(SIZE, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), tuple(f"c{i:02d}" for i in range(IMAGES)))
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("builtin:resnet18", {"width": 16}),
    "convnet": ("builtin:convnet_d3", {"width": 64}),
    "mobilenet": ("builtin:mobilenetv2", {"width_mult": 0.5}),
}


def teachers(folder: str) -> dict[str, TeacherSpec]:
    out = {}
    for index, (name, (arch, kwargs)) in enumerate(TEACHERS.items()):
        spec = TeacherSpec(arch=arch, kwargs=kwargs, weights=storage.join(folder, f"{name}.safetensors"))
        save_weights(spec.weights or "", build_network(spec, IMAGES, 3, seed=index).state_dict())
        out[name] = spec
    return out


def measure(placement: Any, specs: dict[str, TeacherSpec], folder: str, runner: Any) -> float:
    """Seconds a step of the fastest unit but the first."""
    names = list(specs)
    units = [
        RecoverUnit(
            ipc=i, chunk=0, classes=list(range(IMAGES)), logit_teachers=names[:1], bn_teachers=names,
            iterations=STEPS, seed=i,
        )
        for i in range(UNITS)
    ]  # fmt: skip
    options = RecoverOptions(logit_teachers=names[:1], bn_teachers=names, selection="fixed", init="noise")
    stage = recover_stage(folder, "", specs, DATA, options, "i", ActorResources(actors=1, threads=1), placement)
    rows = list(runner(recover_rows(units), [stage]))
    assert not any(row["error"] for row in rows), rows
    return min(row["seconds"] for row in rows[1:]) / STEPS


def main() -> None:
    kinds = {
        "colocated": ("colocated", run_ray),
        "per_teacher": ("per_teacher", run_ray),
        "parts_in_one_process": ("per_teacher", run_serial),
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as root, ray_session(SessionOptions(num_cpus=2, object_store_mb=300)):
        specs = teachers(root)
        for turn in range(ROUNDS):
            for kind, (placement, runner) in kinds.items():
                found[kind].append(measure(placement, specs, storage.join(root, f"{kind}-{turn}"), runner))
    best = {kind: min(values) for kind, values in found.items()}
    result = {
        "seconds_per_step": {kind: round(value, 4) for kind, value in best.items()},
        "per_teacher_over_colocated": round(best["per_teacher"] / best["colocated"], 3),
        "parts_in_one_process_over_colocated": round(best["parts_in_one_process"] / best["colocated"], 3),
        "exchanged_bytes_per_step": 2 * len(TEACHERS) * IMAGES * 3 * SIZE**2 * 4,
        "teachers": {name: [arch, kwargs] for name, (arch, kwargs) in TEACHERS.items()},
        "images": IMAGES,
        "size": SIZE,
        "threads_of_an_actor": 1,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
