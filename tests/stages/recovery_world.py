"""A small world for recovery: data, teachers, units, and what the serial runner makes of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from cluster import shards
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row, run_serial
from stages.data import DataSpec
from stages.recover.options import RecoverOptions
from stages.recover.stage import recover_rows, recover_stage
from stages.recover.unit import RecoverUnit
from stages.teachers.build import build_network
from stages.teachers.options import TeacherSpec
from stages.teachers.weights import save_weights

CLASSES = ("cat", "dog", "owl")
DATA = DataSpec(16, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), CLASSES)
ARCHS = {
    "res": ("builtin:resnet10", {"width": 8}),
    "conv": ("builtin:convnet_d3", {"width": 8}),
    "mobile": ("builtin:mobilenetv2", {"width_mult": 0.25}),
}
# Fails while recovering only, so that loading (which tries a teacher out) succeeds.
BROKEN = '''
import os
import pathlib
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, kill):
        super().__init__()
        self.bn, self.head, self.kill = nn.BatchNorm2d(3), nn.Linear(3, classes), kill

    def forward(self, x):
        if x.requires_grad and self.kill:
            os._exit(1)
        out = self.head(self.bn(x).mean((2, 3)))
        return out * float("nan") if x.requires_grad else out

class Once(nn.Module):
    """Ends its process at the fifth step, the first time that any gets there."""

    def __init__(self, classes):
        super().__init__()
        self.bn, self.head, self.steps = nn.BatchNorm2d(3), nn.Linear(3, classes), 0
        self.marker = pathlib.Path(__file__).with_name("once")

    def forward(self, x):
        self.steps += x.requires_grad
        if self.steps == 5 and not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        return self.head(self.bn(x).mean((2, 3)))

def once(num_classes): return Once(num_classes)
def nan(num_classes): return Net(num_classes, False)
def kill(num_classes): return Net(num_classes, True)
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, TeacherSpec]]:
    """Real-looking data in two shards of two row groups each, and teachers with random weights and statistics."""
    root = tmp_path_factory.mktemp("recover")
    rng = np.random.default_rng(0)
    schema = shards.image_schema(list(CLASSES))
    for shard in range(2):
        rows = []
        for row in range(9):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG" if row % 2 else "PNG")
            path = f"{CLASSES[row % 3]}/{shard}-{row}.png" if shard else None
            rows.append({"image": {"bytes": stream.getvalue(), "path": path}, "label": row % 3})
        table = pa.Table.from_pylist(rows, schema=schema)
        shards.write_shard(str(root / "data" / f"part-{shard}.parquet"), table, row_group_size=5)
    shards.save_dataset(
        shards.Dataset(
            uri=str(root / "data"), class_names=list(CLASSES), channels=3, image_size=None,
            mean=list(DATA.mean), std=list(DATA.std), shards=[("part-0.parquet", 9), ("part-1.parquet", 9)],
            class_counts=[6, 6, 6], fingerprint="f",
        )
    )  # fmt: skip
    (root / "broken.py").write_text(BROKEN)
    archs = {**ARCHS, "nan": (f"user:{root}/broken.py:nan", {}), "kill": (f"user:{root}/broken.py:kill", {}),
             "once": (f"user:{root}/broken.py:once", {})}  # fmt: skip
    specs = {}
    for index, (name, (arch, kwargs)) in enumerate(archs.items()):
        spec = TeacherSpec(arch=arch, kwargs=kwargs, weights=str(root / f"{name}.safetensors"))
        network = build_network(spec, len(CLASSES), 3, seed=index)
        state = network.state_dict()
        noise = torch.Generator().manual_seed(index)
        for key, value in state.items():
            if key.endswith("running_mean"):
                state[key] = 0.3 * torch.randn(value.shape, generator=noise)
            elif key.endswith("running_var"):
                state[key] = 0.5 + torch.rand(value.shape, generator=noise)
        save_weights(spec.weights or "", state)
        specs[name] = spec
    return str(root / "data"), specs


def units_of(teacher_sets: Sequence[Sequence[str]], iterations: int = 6) -> list[RecoverUnit]:
    """One unit per set, with sources spread over shards and row groups."""
    return [
        RecoverUnit(
            ipc=i, chunk=0, classes=[0, 1, 2], logit_teachers=[names[0]], bn_teachers=list(names),
            iterations=iterations + i, seed=100 + i,
            sources=[(i % 2, 3 * (i % 3)), ((i + 1) % 2, 3 * (i % 3) + 1), (i % 2, 8 - 3 * (i % 3))],
        )
        for i, names in enumerate(teacher_sets)
    ]  # fmt: skip


SETS = [["res"], ["res", "conv"], ["res", "mobile", "conv"], ["conv", "mobile"]]


def stage_of(world: tuple[str, dict[str, TeacherSpec]], out: Path, names: Sequence[str], **change: Any) -> ActorStage:
    train, specs = world
    actors, placement = change.pop("actors", 1), change.pop("placement", "colocated")
    options = RecoverOptions(logit_teachers=[names[0]], bn_teachers=list(names), selection="fixed", roll=3, **change)
    return recover_stage(str(out), train, specs, DATA, options, "identity-1", ActorResources(actors=actors), placement)


def shard_bytes(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for f in ("init", "recovered") for p in sorted((out / f).iterdir())}


@pytest.fixture(scope="module")
def serial(
    world: tuple[str, dict[str, TeacherSpec]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Row]]:
    out = tmp_path_factory.mktemp("serial")
    stage = stage_of(world, out, list(ARCHS))
    return out, list(run_serial(recover_rows(units_of(SETS)), [stage]))


class Lost(BaseException):
    """The process is gone."""
