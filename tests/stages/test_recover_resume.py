"""A unit that lost its worker goes on from its kept state, and only from its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from recovery_world import ARCHS, SETS, Lost, shard_bytes, stage_of, units_of

from cluster import preemption
from cluster.progress import read_progress
from cluster.runner import ActorStage, Row, run_serial
from stages.recover.stage import recover_rows
from stages.recover.unit import RecoverUnit


def cut_short(stage: ActorStage, unit: RecoverUnit, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a unit until its worker is lost after a step."""
    from stages.recover import core

    def disturbed(*args: Any, on_step: Any, **more: Any) -> Any:
        def step(done: int, total: int) -> None:
            if done == at:
                raise Lost
            on_step(done, total)

        return core.recover_unit(*args, on_step=step, **more)

    with monkeypatch.context() as patch:
        patch.setattr("stages.recover.stage.recover_unit", disturbed)
        with pytest.raises(Lost):
            list(run_serial(recover_rows([unit]), [stage]))


def steps_made(stage: ActorStage, unit: RecoverUnit, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run a unit to its end; the steps it made."""
    from stages.recover import core

    made: list[int] = []

    def watched(*args: Any, on_step: Any, **more: Any) -> Any:
        return core.recover_unit(*args, on_step=lambda done, total: made.append(done), **more)

    with monkeypatch.context() as patch:
        patch.setattr("stages.recover.stage.recover_unit", watched)
        (row,) = run_serial(recover_rows([unit]), [stage])
    assert row["error"] == ""
    return made


def test_a_unit_goes_on_from_its_kept_state(
    serial: tuple[Path, list[Row]], world: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = units_of(SETS)[2]  # 8 steps
    stage = stage_of(world, tmp_path, list(ARCHS), checkpoint_every=3)
    state = tmp_path / "progress" / "state" / f"{unit.id}.safetensors"
    cut_short(stage, unit, 8, monkeypatch)
    assert [p.name for p in state.parent.iterdir()] == [state.name]
    assert steps_made(stage, unit, monkeypatch) == [7, 8]
    assert not state.exists()
    assert read_progress(str(tmp_path / "progress" / "recover"))[unit.id]["attempt"] == 2
    for name, content in shard_bytes(tmp_path).items():
        assert content == (serial[0] / name).read_bytes()


@pytest.mark.parametrize("damage", ["identity", "unit", "cut", "flip"])
def test_a_foreign_or_damaged_state_is_ignored(
    serial: tuple[Path, list[Row]], world: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    unit = units_of(SETS)[2]
    stage = stage_of(world, tmp_path, list(ARCHS), checkpoint_every=3)
    other = unit.model_copy(update={"seed": 1}) if damage == "unit" else unit
    foreign = dataclasses.replace(stage, kwargs={**stage.kwargs, "identity": "other"})
    cut_short(foreign if damage == "identity" else stage, other, 7, monkeypatch)
    state = tmp_path / "progress" / "state" / f"{unit.id}.safetensors"
    content = bytearray(state.read_bytes())
    if damage == "cut":
        del content[-1]
    elif damage == "flip":
        content[-1] ^= 1
    state.write_bytes(content)
    assert steps_made(stage, unit, monkeypatch) == list(range(1, 9))
    assert not state.exists()
    for name, content in shard_bytes(tmp_path).items():
        assert content == (serial[0] / name).read_bytes()


def test_without_checkpoints_only_a_notice_keeps_the_state(
    serial: tuple[Path, list[Row]], world: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = units_of(SETS)[2]
    stage = stage_of(world, tmp_path, list(ARCHS))
    folder = tmp_path / "progress" / "state"
    cut_short(stage, unit, 7, monkeypatch)
    assert not folder.exists()
    looks = iter([False, False, False, True])
    monkeypatch.setattr(preemption, "noticed", lambda: next(looks))

    def leave() -> None:
        raise Lost

    monkeypatch.setattr(preemption, "leave", leave)
    with pytest.raises(Lost):
        list(run_serial(recover_rows([unit]), [stage]))
    monkeypatch.setattr(preemption, "noticed", lambda: False)
    record = read_progress(str(tmp_path / "progress" / "recover"))[unit.id]
    # The second start, but the first that counts.
    assert (record["done"], record["attempt"], record["session_attempt"]) == (4, 2, 1)
    assert steps_made(stage, unit, monkeypatch) == [5, 6, 7, 8]
    for name, content in shard_bytes(tmp_path).items():
        assert content == (serial[0] / name).read_bytes()


def test_a_state_that_cannot_be_kept_does_not_fail_the_unit(
    world: tuple[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unit = units_of(SETS)[0]
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "state").touch()
    (row,) = run_serial(recover_rows([unit]), [stage_of(world, tmp_path, ["res"], checkpoint_every=4)])
    assert row["error"] == ""
    assert "the state after step 4 could not be kept" in caplog.text
