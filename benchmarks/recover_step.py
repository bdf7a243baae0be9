"""How much faster a step of recovery is than the published way (``stages/recover/reference.py``), and what brought it.

    python benchmarks/recover_step.py 224 5 > benchmarks/results/recover_step_224_cpu.json     # images, rounds
    python benchmarks/recover_step.py 32 5

``224``: the timm networks resnet18 (primary), mobilenetv2_100 and efficientnet_b0, 32 images of 224 px. ``32``: five
small families, 100 images of 32 px. Weights are random, for speed does not depend on them. All ways take turns in one
process; what counts are medians of image-steps a second, augmentation and optimiser included. After that each way makes
one step in a process of its own, whose memory is watched (on GPUs the allocator's).

The ways, each with what the one before has: ``reference``; ``once`` = the primary runs once for both losses, the others
stop after their last BatchNorm layer, statistics with their gradient in one pass; ``channels_last``; ``memory`` = freed
memory is kept and used again; ``compiled``; ``bf16``, where the processor computes in it. ``reference_memory`` is the
published way with memory kept. On GPUs ``reference_tf32`` is the published way with TF32 and channels last, and
``tf32`` ours compiled with TF32.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from stages.data import DataSpec
from stages.device import pick_device, reuse_memory
from stages.recover.compiler import prepare_compiler
from stages.recover.core import recover_unit
from stages.recover.objective import LocalObjective
from stages.recover.options import RecoverOptions
from stages.recover.reference import ReferenceStep
from stages.recover.speed import Way, copy_rate, has_bf16, in_turns, matmul_rate, processor
from stages.recover.unit import RecoverUnit
from stages.teachers.build import build_network, memory_format
from stages.teachers.options import TeacherSpec
from stages.teachers.teacher import Teacher


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        archs: the pool, the primary first.
        size, images, classes: of the batch.
        steps: of one turn.
    """

    archs: tuple[str, ...]
    size: int
    images: int
    classes: int
    steps: int


CASES = {
    "224": Case(("timm:resnet18", "timm:mobilenetv2_100", "timm:efficientnet_b0"), 224, 32, 1000, 2),
    "32": Case(
        ("builtin:resnet10", "builtin:vgg_bn", "builtin:convnet_d3", "builtin:wrn16_2", "builtin:shufflenetv2"),
        32, 100, 100, 4,
    ),
    "gpu": Case(
        ("timm:resnet18", "timm:mobilenetv2_100", "timm:efficientnet_b0", "torchvision:shufflenet_v2_x1_0"),
        224, 100, 1000, 10,
    ),
    "smoke": Case(("builtin:resnet10", "builtin:convnet_d3"), 32, 4, 10, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What a way has.

    Attributes:
        published: the reference step.
        channels_last: else contiguous.
        memory: ``reuse_memory``.
        compile, precision: of recovery.
    """

    published: bool = False
    channels_last: bool = True
    memory: bool = False
    compile: bool = False
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"


REFERENCE = Kind(published=True, channels_last=False)
BEFORE = {"reference": REFERENCE, "once": Kind(channels_last=False), "channels_last": Kind()}
CPU_WAYS = {
    **BEFORE,
    "memory": Kind(memory=True),
    "compiled": Kind(memory=True, compile=True),
    "bf16": Kind(memory=True, compile=True, precision="bf16"),
    "reference_memory": replace(REFERENCE, memory=True),
}
GPU_WAYS = {
    **BEFORE,
    "compiled": Kind(compile=True),
    "tf32": Kind(compile=True, precision="tf32"),
    "bf16": Kind(compile=True, precision="bf16"),
    "reference_tf32": Kind(published=True, precision="tf32"),
}


def ways_of(name: str, device: torch.device) -> dict[str, Kind]:
    """Those to compare."""
    if name == "smoke":
        return {"reference": REFERENCE, "memory": CPU_WAYS["memory"]}
    ways = GPU_WAYS if device.type == "cuda" else CPU_WAYS
    return {way: kind for way, kind in ways.items() if kind.precision != "bf16" or has_bf16(device)}


def make_way(kind: Kind, case: Case, device: torch.device) -> Way:
    """What makes ``case.steps`` steps and gives the images, after one of them where memory is kept for the next."""
    names = tuple(f"c{i:04d}" for i in range(case.classes))
    data = DataSpec(case.size, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), names)
    pool: dict[str, nn.Module] = {
        arch: build_network(TeacherSpec(arch=arch), case.classes, 3, seed=index).to(device)
        for index, arch in enumerate(case.archs)
    }
    torch.manual_seed(0)
    x = torch.randn(case.images, 3, case.size, case.size, device=device)
    roll = case.size // 7
    options = RecoverOptions(r_bn=0.01, lr=0.05, roll=roll, compile=kind.compile, precision=kind.precision)

    def way_of(run: Callable[[int], torch.Tensor]) -> Way:
        def ready() -> None:
            if device.type == "cpu":
                reuse_memory(kind.memory)
            if kind.memory:
                run(1)

        return Way(lambda: run(case.steps), ready)

    if kind.published:
        layout = torch.channels_last if kind.channels_last else torch.contiguous_format
        pool = {arch: network.to(memory_format=layout) for arch, network in pool.items()}
        x = x.to(memory_format=layout)
        reference = ReferenceStep(pool, next(iter(pool)), list(pool), options.r_bn, tf32=kind.precision == "tf32")
        y = torch.arange(case.images, device=device)
        low, high = data.valid_range(x)

        def published(steps: int) -> torch.Tensor:
            return reference.optimise(x, y, steps, options.lr, low, high, options.roll)

        return way_of(published)
    teachers = {}
    for arch, network in pool.items():
        layout = memory_format(network) if kind.channels_last else torch.contiguous_format
        teachers[arch] = Teacher(arch, network, data, num_outputs=case.classes).to(memory_format=layout)
    unit = RecoverUnit(
        ipc=0, chunk=0, classes=list(range(case.images)), logit_teachers=list(pool)[:1], bn_teachers=list(pool),
        iterations=1, seed=0,
    )  # fmt: skip
    # Kept between turns, as an actor keeps it between units.
    objective = LocalObjective(teachers, options)

    def ours(steps: int) -> torch.Tensor:
        work = unit.model_copy(update={"iterations": steps})
        return recover_unit(work, x, objective, options, data, device).pixels

    return way_of(ours)


def peak_bytes(way: Way, device: torch.device) -> int:
    """Of the memory that steps take beyond what is in use before; on CPUs, by Linux, what the process holds of it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way.run().sum().item()
        return torch.cuda.max_memory_allocated() - before
    # What the process keeps for later goes back first.
    reuse_memory(False)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    way.ready()
    way.run().sum().item()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])


def print_peak(name: str, way: str) -> None:
    """In a process of its own, after a first turn: of as many steps as a turn has."""
    case, device = CASES[name], pick_device(True)
    kind = ways_of(name, device)[way]
    if kind.compile:
        prepare_compiler(device)
    made = make_way(kind, case, device)
    made.ready()
    made.run()
    print(peak_bytes(made, device))


def peak_of(name: str, way: str) -> float:
    """MB an image."""
    command = [sys.executable, __file__, "peak", name, way]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return round(int(found.split()[-1]) / CASES[name].images / 1e6, 2)


def main(name: str, rounds: str = "5") -> None:
    case, device = CASES[name], pick_device(True)
    wanted = ways_of(name, device)
    if any(kind.compile for kind in wanted.values()):
        prepare_compiler(device)
    ways: dict[str, Way] = {way: make_way(kind, case, device) for way, kind in wanted.items()}
    work = case.images * case.steps
    rates = {way: [work / value for value in values] for way, values in in_turns(ways, int(rounds)).items()}
    medians = {way: statistics.median(values) for way, values in rates.items()}
    if device.type == "cuda":
        peaks = {way: round(peak_bytes(ways[way], device) / case.images / 1e6, 2) for way in wanted}
    else:
        peaks = {way: peak_of(name, way) for way in wanted}
    result = {
        "case": name,
        "image_steps_per_s": {way: round(value, 2) for way, value in medians.items()},
        "ratio": {way: round(value / medians["reference"], 2) for way, value in medians.items()},
        "peak_mb_per_image": peaks,
        "peak_ratio": {way: round(value / peaks["reference"], 3) for way, value in peaks.items()},
        "rounds": {way: [round(value, 2) for value in values] for way, values in rates.items()},
        "environment": {
            "device": processor(device),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "matmul_gflops": {kind: round(matmul_rate(device, kind) / 1e9, 1) for kind in ("fp32", "tf32", "bf16")},
            "copy_gb_per_s": round(copy_rate(device) / 1e9, 1),
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    print_peak(*sys.argv[2:]) if sys.argv[1] == "peak" else main(*sys.argv[1:])
