"""How much faster a step of recovery is than the published way of it (``reference_step.py``), and what brought it.

    python benchmarks/recover_step.py 224 5 > benchmarks/results/recover_step_224_cpu.json     # images, rounds
    python benchmarks/recover_step.py 32 5

``224``: the timm networks resnet18 (primary), mobilenetv2_100 and efficientnet_b0, 32 images of 224 px. ``32``: five
small families, 100 images of 32 px. Weights are random, for speed does not depend on them. All ways take turns in one
process; what counts are medians of image-steps a second, augmentation and optimiser included. After that each way makes
one step in a process of its own, whose memory is watched (on GPUs the allocator's).

The ways, each with what the one before has: ``reference``; ``once`` = the primary runs once for both losses, the others
stop after their last BatchNorm layer, statistics with their gradient in one pass; ``channels_last``; ``compiled``;
``bf16``, where the processor computes in it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from reference_step import ReferenceStep
from torch import nn

from stages.data import DataSpec
from stages.device import pick_device
from stages.recover.core import recover_unit
from stages.recover.objective import LocalObjective
from stages.recover.options import RecoverOptions
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
    "224": Case(("timm:resnet18", "timm:mobilenetv2_100", "timm:efficientnet_b0"), 224, 32, 1000, 3),
    "32": Case(
        ("builtin:resnet10", "builtin:vgg_bn", "builtin:convnet_d3", "builtin:wrn16_2", "builtin:shufflenetv2"),
        32, 100, 100, 4,
    ),
    "smoke": Case(("builtin:resnet10", "builtin:convnet_d3"), 32, 4, 10, 1),
}  # fmt: skip


Way = Callable[[], torch.Tensor]
WAYS = ("reference", "once", "channels_last", "compiled", "bf16")


def make_way(name: str, case: Case, device: torch.device) -> Way:
    """What makes ``case.steps`` steps and gives the images."""
    names = tuple(f"c{i:04d}" for i in range(case.classes))
    data = DataSpec(case.size, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), names)
    pool: dict[str, nn.Module] = {
        arch: build_network(TeacherSpec(arch=arch), case.classes, 3, seed=index).to(device)
        for index, arch in enumerate(case.archs)
    }
    torch.manual_seed(0)
    x = torch.randn(case.images, 3, case.size, case.size, device=device)
    options = RecoverOptions(
        r_bn=0.01,
        lr=0.05,
        roll=case.size // 7,
        compile=name in ("compiled", "bf16"),
        precision="bf16" if name == "bf16" else "fp32",
    )
    if name == "reference":
        reference = ReferenceStep(pool, next(iter(pool)), list(pool), options.r_bn)
        y = torch.arange(case.images, device=device)
        low, high = data.valid_range(x)
        return lambda: reference.optimise(x, y, case.steps, options.lr, low, high, options.roll)
    teachers = {}
    for arch, network in pool.items():
        layout = torch.contiguous_format if name == "once" else memory_format(network)
        teachers[arch] = Teacher(arch, network, data, num_outputs=case.classes).to(memory_format=layout)
    unit = RecoverUnit(
        ipc=0, chunk=0, classes=list(range(case.images)), logit_teachers=list(pool)[:1], bn_teachers=list(pool),
        iterations=case.steps, seed=0,
    )  # fmt: skip
    # Kept between turns, as an actor keeps it between units.
    objective = LocalObjective(teachers, options)
    return lambda: recover_unit(unit, x, objective, options, data, device).pixels


def in_turns(ways: dict[str, Way], rounds: int, work: int) -> dict[str, list[float]]:
    """Rates of each way, ``work`` a call, in its turns."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            # Waits for the device, for it brings the images back.
            run().sum().item()
            # The first turn warms up, and compiles.
            if turn:
                rates[name].append(work / (time.perf_counter() - start))
    return rates


def peak_bytes(run: Way, device: torch.device) -> int:
    """Of the memory that ``run`` takes beyond what there is before (on CPUs Linux tells)."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run().sum().item()
        return torch.cuda.max_memory_allocated() - before
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run().sum().item()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])


def print_peak(name: str, way: str) -> None:
    """In a process of its own: the peak of a step that is not the first."""
    case, device = replace(CASES[name], steps=1), pick_device(True)
    run = make_way(way, case, device)
    run()
    print(peak_bytes(run, device))


def peak_of(name: str, way: str) -> float:
    """MB an image."""
    # Large tensors go back to the system at once, so that what is resident is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "peak", name, way]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return round(int(found.split()[-1]) / CASES[name].images / 1e6, 2)


def main(name: str, rounds: str = "5") -> None:
    case, device = CASES[name], pick_device(True)
    # Ours has TF32 off in any case.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    wanted = [way for way in WAYS if way != "bf16" or has_bf16(device)]
    if name == "smoke":
        wanted = ["reference", "channels_last"]
    ways = {way: make_way(way, case, device) for way in wanted}
    rates = in_turns(ways, int(rounds), case.images * case.steps)
    medians = {way: statistics.median(values) for way, values in rates.items()}
    peaks = {way: peak_of(name, way) for way in wanted}
    first = wanted[0]
    result = {
        "case": name,
        "image_steps_per_s": {way: round(value, 2) for way, value in medians.items()},
        "ratio": {way: round(value / medians[first], 2) for way, value in medians.items()},
        "peak_mb_per_image": peaks,
        "peak_ratio": {way: round(value / peaks[first], 3) for way, value in peaks.items()},
        "rounds": {way: [round(value, 2) for value in values] for way, values in rates.items()},
        "environment": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "matmul_gflops": round(matmul_rate(device) / 1e9, 1),
        },
    }
    print(json.dumps(result))


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed in hardware; elsewhere it is emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.backends.cpu.get_cpu_capability() != "AVX2" and "bf16" in Path("/proc/cpuinfo").read_text())


def processor() -> str:
    """Its name, or kind."""
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return named[0].partition(":")[2].strip() if named else platform.machine()


def matmul_rate(device: torch.device, size: int = 1024) -> float:
    """Floating-point operations a second of a float32 matrix product: what the machine can do at best."""
    a, best = torch.randn(size, size, device=device), 0.0
    for _ in range(20):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    print_peak(*sys.argv[2:]) if sys.argv[1] == "peak" else main(*sys.argv[1:])
