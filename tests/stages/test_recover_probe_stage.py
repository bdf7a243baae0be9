"""The probe as a stage: in an actor, whose workers are processes of its own."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch

from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row, run_ray
from stages.data import DataSpec
from stages.recover import probe_stage as module
from stages.recover.occupancy import Sharing
from stages.recover.options import RecoverOptions
from stages.recover.probe_stage import ProbeStage, probe_stage
from stages.recover.stage import recover_rows
from stages.recover.unit import RecoverUnit
from stages.teachers.options import TeacherSpec

# Ray's workers cannot import a test module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

DATA = DataSpec(16, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), tuple("abc"))
OPTIONS = RecoverOptions(iterations=9, logit_teachers=["a"], bn_teachers=["a"])
TEACHERS = {"a": TeacherSpec(arch="builtin:convnet_d3"), "idle": TeacherSpec(arch="builtin:none")}
UNIT = RecoverUnit(
    ipc=0, chunk=0, classes=[0, 1, 2], logit_teachers=["a"], bn_teachers=["a"], iterations=9, seed=0
)  # fmt: skip


class OnCpus:
    """The stage, with two workers on the CPU."""

    def __init__(self, **kwargs: Any):
        from stages.recover import probe_stage, timing

        timing.TURN_S = 0.05
        probe_stage.sharings = lambda device, cpus: [Sharing(1, 1), Sharing(2, 1)]
        self._stage = probe_stage.ProbeStage(**kwargs)

    def __call__(self, row: Row) -> Row:
        return self._stage(row)


def stage(out: Path) -> ActorStage:
    return probe_stage(str(out), TEACHERS, DATA, OPTIONS, 4, threads=1)


@pytest.mark.ray
def test_an_actor_measures_with_processes(tmp_path: Path, ray_local: None) -> None:
    own = ActorResources(gpus=0, cpus=0.5, actors=1)
    (row,) = run_ray(recover_rows([UNIT]), [replace(stage(tmp_path), factory=OnCpus, resources=own)])
    assert row["error"] == ""
    assert row["workers"] in (1, 2)
    assert len(row["rates"]) == 2
    assert min(row["rates"]) > 0


def test_it_has_a_gpu(tmp_path: Path) -> None:
    assert stage(tmp_path).resources == ActorResources(threads=1, gpus=1, actors=1)


@pytest.mark.parametrize(
    ("gpu", "most", "counts"), [(True, 2, [1, 2]), (True, 3, [1, 2]), (True, 9, [1, 2, 4]), (False, 9, [1])]
)
def test_what_is_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: bool, most: int, counts: list[int]
) -> None:
    """With the threads of recovery's actors; a GPU that torch does not see is none."""
    asked: list[Sharing] = []
    monkeypatch.setattr(module, "pick_device", lambda wanted: torch.device("cuda" if gpu else "cpu"))
    monkeypatch.setattr(ProbeStage, "_steps", lambda *args: 1)
    monkeypatch.setattr(module, "compare", lambda *args: asked.extend(args[5]) or {Sharing(1, 1): 1.0})
    ProbeStage(**{**stage(tmp_path).kwargs, "most": most})(recover_rows([UNIT])[0])
    assert asked == [Sharing(count, torch.get_num_threads()) for count in counts]


@pytest.mark.parametrize(
    ("rates", "workers"),
    [
        ({1: 10.0, 2: 30.0, 4: 20.0}, 2),
        ({1: 10.0, 2: 12.0, 4: None}, 2),
        ({1: 10.0, 2: 20.0, 4: 20.9}, 2),
        ({1: 10.0, 2: 9.0, 4: 10.4}, 1),
        ({1: 10.0, 2: None}, 1),
        ({1: None}, 1),
    ],
)
def test_the_fewest_that_are_about_the_fastest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rates: dict[int, float | None], workers: int
) -> None:
    def compare(*args: Any) -> dict[Sharing, float | None]:
        return {Sharing(count, 1): rate for count, rate in rates.items()}

    monkeypatch.setattr(module, "compare", compare)
    row = ProbeStage(**stage(tmp_path).kwargs)(recover_rows([UNIT])[0])
    assert row["workers"] == workers
    assert [None if math.isnan(rate) else rate for rate in row["rates"]] == list(rates.values())


def test_what_a_turn_is_does_not_depend_on_the_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which compiles: a turn of a single step would be noise."""
    seen: list[int] = []

    def ours(step: Any, steps: int) -> torch.Tensor:
        seen.append(steps)
        time.sleep(0.5 if len(seen) == 1 else 0.02)
        return torch.zeros(1)

    asked: list[int] = []
    monkeypatch.setattr(module.TimedStep, "ours", ours)
    monkeypatch.setattr(module, "compare", lambda *args: asked.append(args[6]) or {Sharing(1, 1): 1.0})
    ProbeStage(**stage(tmp_path).kwargs)(recover_rows([UNIT])[0])
    assert seen == [1, 1]
    assert 20 < asked[0] <= 100
