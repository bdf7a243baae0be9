"""How much faster a step of recovery is than the published way of it (``reference_step.py``).

    python benchmarks/recover_step.py 224 5 > benchmarks/results/recover_step_224_cpu.json     # images, rounds
    python benchmarks/recover_step.py 32 5

``224``: the timm networks resnet18 (primary), mobilenetv2_100 and efficientnet_b0, 32 images of 224 px. ``32``: five
small families, 100 images of 32 px. Weights are random, for speed does not depend on them. Both ways take turns in one
process; what counts are medians of image-steps a second, augmentation and optimiser included.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from reference_step import ReferenceStep
from torch import nn

from stages.data import DataSpec
from stages.recover.core import recover_unit
from stages.recover.options import RecoverOptions
from stages.recover.unit import RecoverUnit
from stages.teachers.build import build_network
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


def ways(case: Case, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """Name → what makes ``case.steps`` steps and gives the images."""
    names = tuple(f"c{i:04d}" for i in range(case.classes))
    data = DataSpec(case.size, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), names)
    pool: dict[str, nn.Module] = {
        arch: build_network(TeacherSpec(arch=arch), case.classes, 3, seed=index).to(device)
        for index, arch in enumerate(case.archs)
    }
    options = RecoverOptions(r_bn=0.01, lr=0.05, roll=case.size // 7)
    # As recovery loads them.
    teachers = {
        n: Teacher(n, copy.deepcopy(network), data, num_outputs=case.classes).to(memory_format=torch.channels_last)
        for n, network in pool.items()
    }
    unit = RecoverUnit(
        ipc=0, chunk=0, classes=list(range(case.images)), logit_teachers=list(pool)[:1], bn_teachers=list(pool),
        iterations=case.steps, seed=0,
    )  # fmt: skip
    reference = ReferenceStep(pool, next(iter(pool)), list(pool), options.r_bn)
    torch.manual_seed(0)
    x = torch.randn(case.images, 3, case.size, case.size, device=device)
    y = torch.arange(case.images, device=device)
    low, high = data.valid_range(x)
    return {
        "reference": lambda: reference.optimise(x, y, case.steps, options.lr, low, high, options.roll),
        "ours": lambda: recover_unit(unit, x, teachers, options, data, device).pixels,
    }


def main(name: str, rounds: str = "5") -> None:
    case, device = CASES[name], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Ours has TF32 off in any case.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    found = ways(case, device)
    rates: dict[str, list[float]] = {way: [] for way in found}
    for turn in range(int(rounds) + 1):
        for way, run in found.items():
            start = time.perf_counter()
            # Waits for the device, for it brings the images back.
            run().sum().item()
            rate = case.images * case.steps / (time.perf_counter() - start)
            # The first turn warms up.
            if turn:
                rates[way].append(rate)
    medians = {way: round(statistics.median(values), 2) for way, values in rates.items()}
    result = {
        "case": name,
        "image_steps_per_s": medians,
        "ratio": round(medians["ours"] / medians["reference"], 2),
        "rounds": {way: [round(value, 2) for value in values] for way, values in rates.items()},
        "environment": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
