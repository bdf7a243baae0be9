"""Every teacher in an actor of its own: the same images up to rounding, and actors that die."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from recovery_world import ARCHS, SETS, Lost, shard_bytes, stage_of, units_of

from cluster import preemption
from cluster.attempts import MAX_ATTEMPTS
from cluster.errors import HelperLost
from cluster.progress import read_progress
from cluster.runner import Row, run_ray, run_serial
from stages.images import to_pixels
from stages.recover.stage import recover_rows
from stages.recover.unit import RecoverUnit
from stages.teachers.options import TeacherSpec


def pixels_of(out: Path, unit: RecoverUnit) -> np.ndarray:
    rows = pq.read_table(out / "recovered" / f"{unit.id}.parquet").to_pylist()
    return np.stack([to_pixels(row["image"]["bytes"], 16, 3) for row in rows]).astype(int)


@pytest.fixture(scope="module")
def split_serial(world: tuple[str, dict[str, TeacherSpec]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every teacher by itself, in this process."""
    out = tmp_path_factory.mktemp("split")
    stage = stage_of(world, out, list(ARCHS), placement="per_teacher")
    assert [row["error"] for row in run_serial(recover_rows(units_of(SETS)), [stage])] == [""] * len(SETS)
    return out


def test_per_teacher_agrees_with_colocated(split_serial: Path, serial: tuple[Path, list[Row]]) -> None:
    for unit in units_of(SETS):
        gap = np.abs(pixels_of(split_serial, unit) - pixels_of(serial[0], unit))
        assert gap.mean() < 0.1
        parts, whole = (
            pq.read_table(out / "recovered" / f"{unit.id}.parquet").to_pylist()[0] for out in (split_serial, serial[0])
        )
        assert parts["loss_ce"] == pytest.approx(whole["loss_ce"], rel=1e-3)
        assert parts["loss_bn"] == pytest.approx(whole["loss_bn"], rel=1e-3)


def test_teachers_actors_that_die_while_they_load_are_bounded_too(
    world: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*args: Any) -> None:
        raise HelperLost("killed")

    def leave() -> None:
        raise Lost

    monkeypatch.setattr("stages.recover.stage.split_objective", dies)
    monkeypatch.setattr(preemption, "leave", leave)
    stage = stage_of(world, tmp_path, ["res"], placement="per_teacher")
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(Lost):
            list(run_serial(recover_rows(units_of([["res"]])), [stage]))
    (row,) = run_serial(recover_rows(units_of([["res"]])), [stage])
    assert "lost its worker 3 times" in row["error"]


@pytest.mark.ray
def test_per_teacher_has_actors_of_its_own(
    split_serial: Path, world: tuple[str, Any], tmp_path: Path, ray_local: None
) -> None:
    stage = stage_of(world, tmp_path, list(ARCHS), placement="per_teacher")
    rows = list(run_ray(recover_rows(units_of(SETS)), [stage]))
    assert [row["error"] for row in rows] == [""] * len(SETS)
    assert shard_bytes(tmp_path) == shard_bytes(split_serial)


@pytest.mark.ray
@pytest.mark.slow
def test_the_death_of_a_teachers_actor_restarts_the_unit(
    world: tuple[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """In its middle: the pixels are still there."""
    units = units_of([["res", "once"]], iterations=8)
    marker = Path(world[0]).parent / "once"
    marker.touch()
    stage = stage_of(world, tmp_path / "whole", ["res", "once"], placement="per_teacher")
    assert [row["error"] for row in run_serial(recover_rows(units), [stage])] == [""]
    marker.unlink()
    stage = stage_of(world, tmp_path / "cut", ["res", "once"], placement="per_teacher")
    (row,) = run_ray(recover_rows(units), [stage])
    assert (row["error"], row["attempt"]) == ("", 2)
    assert marker.exists()
    record = read_progress(str(tmp_path / "cut" / "progress" / "recover"))[units[0].id]
    assert record["from"] == 4
    assert shard_bytes(tmp_path / "cut") == shard_bytes(tmp_path / "whole")
