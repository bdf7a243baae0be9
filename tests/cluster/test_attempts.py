"""Starts of a unit: counted over all sessions, bounded within one, forgiven where the unit is not to blame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.attempts import MAX_ATTEMPTS, Attempt, Attempts
from cluster.errors import RunError
from cluster.progress import read_progress


def begin(folder: Path, session: str = "s1", **more: Any) -> Attempt:
    return Attempts(str(folder), session, "lower x").begin("u", 100, "unit u (seed 7)", **more)


def test_starts_without_an_end_are_bounded_within_a_session(tmp_path: Path) -> None:
    assert [begin(tmp_path).number for _ in range(MAX_ATTEMPTS)] == [1, 2, 3]
    with pytest.raises(RunError, match=r"^unit u \(seed 7\) lost its worker 3 times, .*; lower x, or"):
        begin(tmp_path)
    # Giving up is no start.
    assert read_progress(str(tmp_path))["u"]["attempt"] == 3
    assert begin(tmp_path, "s2").number == 4
    assert [begin(tmp_path, "s2").number for _ in range(MAX_ATTEMPTS - 1)] == [5, 6]
    with pytest.raises(RunError):
        begin(tmp_path, "s2")


def test_a_notice_does_not_count(tmp_path: Path) -> None:
    for number in range(1, 3 * MAX_ATTEMPTS):
        attempt = begin(tmp_path)
        assert attempt.number == number
        attempt.excuse(0)
    for _ in range(MAX_ATTEMPTS):
        begin(tmp_path)
    with pytest.raises(RunError):
        begin(tmp_path)


def test_a_start_that_gets_on_does_not_count(tmp_path: Path) -> None:
    for done in range(0, 90, 10):
        begin(tmp_path, done=done)
    for _ in range(MAX_ATTEMPTS - 1):
        begin(tmp_path, done=80)
    with pytest.raises(RunError):
        begin(tmp_path, done=80)


def test_progress_is_not_an_end_but_finish_is(tmp_path: Path) -> None:
    for _ in range(MAX_ATTEMPTS):
        attempt = begin(tmp_path)
        attempt.update(100)  # the last step; what follows may still kill the worker
        assert read_progress(str(tmp_path))["u"]["done"] == 0
    with pytest.raises(RunError):
        begin(tmp_path)
    attempt.finish()
    assert read_progress(str(tmp_path))["u"]["done"] == 100
    for _ in range(2 * MAX_ATTEMPTS):
        begin(tmp_path).finish()


def test_another_content_starts_anew(tmp_path: Path) -> None:
    for _ in range(MAX_ATTEMPTS):
        begin(tmp_path, key="a")
    assert begin(tmp_path, key="b").number == 1


def test_begun_and_finished_later(tmp_path: Path) -> None:
    attempts = Attempts(str(tmp_path), "s1", "")
    assert not attempts.begun("u")
    begin(tmp_path)
    begin(tmp_path)
    assert attempts.begun("u")
    assert not Attempts(str(tmp_path), "s2", "").begun("u")
    assert attempts.finish("u") == 2
    assert read_progress(str(tmp_path))["u"]["done"] == 100


def test_a_damaged_record_is_none(tmp_path: Path) -> None:
    (tmp_path / "u.json").write_text('{"done": 1')
    assert begin(tmp_path).number == 1
    assert json.loads((tmp_path / "u.json").read_text())["session"] == "s1"
