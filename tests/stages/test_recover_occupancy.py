"""The probe's workers are real processes, and what ends one of them ends the probe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from stages.data import DataSpec
from stages.recover.occupancy import Layout, layouts, probe
from stages.recover.options import RecoverOptions
from stages.recover.unit import RecoverUnit
from stages.teachers.options import TeacherSpec

CPU = torch.device("cpu")
DATA = DataSpec(16, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), tuple("abc"))
UNIT = RecoverUnit(
    ipc=0, chunk=0, classes=[0, 1, 2], logit_teachers=["a"], bn_teachers=["a"], iterations=9, seed=0
)  # fmt: skip

MINE = """
import os
from torch import nn

class Network(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x):
        {line}
"""


def rate(arch: str, workers: int) -> float | None:
    specs = {"a": TeacherSpec(arch=arch)}
    return probe(UNIT, specs, DATA, RecoverOptions(iterations=9), CPU, Layout(workers, 1), 1, 0.1)


def test_two_workers_at_once() -> None:
    found = rate("builtin:convnet_d3", 2)
    assert found is not None
    assert found > 0


def mine(folder: Path, line: str) -> str:
    (folder / "mine.py").write_text(MINE.format(line=line))
    return f"user:{folder}/mine.py:Network"


@pytest.mark.parametrize("line", ["os._exit(9)", "raise MemoryError"])
def test_workers_that_find_no_memory(tmp_path: Path, line: str) -> None:
    assert rate(mine(tmp_path, line), 2) is None


def test_other_errors_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not for this"):
        rate(mine(tmp_path, "raise ValueError('not for this')"), 2)


def test_layouts_use_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert layouts(CPU) == [Layout(6, 1), Layout(3, 2), Layout(1, 4), Layout(1, 6)]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert layouts(CPU) == [Layout(1, 1)]
    assert layouts(torch.device("cuda")) == [Layout(1, 1), Layout(2, 1), Layout(4, 1)]
