"""Progress files and their display."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from cluster import progress
from cluster.progress import ProgressWriter, StageProgress, read_progress


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, highlight=False, width=200))
    return stream


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_writer_keeps_to_its_interval_except_at_the_end(tmp_path: Path, clock: list[float]) -> None:
    writer = ProgressWriter(str(tmp_path), "unit-1", interval_s=1.0)
    seen = []
    for step, at in [(1, 0.0), (2, 0.5), (3, 0.9), (4, 1.0), (5, 1.5), (9, 1.6)]:
        clock[0] = 1000 + at
        writer.update(step, 9, f"step {step}", loss=step / 2)
        seen.append(read_progress(str(tmp_path))["unit-1"]["done"])
    assert seen == [1, 1, 1, 4, 4, 9]
    record = read_progress(str(tmp_path))["unit-1"]
    assert (record["total"], record["message"], record["loss"]) == (9, "step 9", 4.5)


def test_forced_update_is_written(tmp_path: Path, clock: list[float]) -> None:
    writer = ProgressWriter(str(tmp_path), "a")
    writer.update(0, 5)
    writer.update(1, 5, force=True)
    assert read_progress(str(tmp_path))["a"]["done"] == 1


def test_reading_skips_broken_and_temporary_files(tmp_path: Path) -> None:
    assert read_progress(str(tmp_path / "missing")) == {}
    ProgressWriter(str(tmp_path), "good").update(1, 2)
    (tmp_path / "half.json").write_text('{"done": 1')
    (tmp_path / ".tmp-1-other.json").write_text('{"done": 1}')
    (tmp_path / "note.txt").write_text("x")
    assert set(read_progress(str(tmp_path))) == {"good"}


def test_lines_off_a_terminal_say_count_and_time_left(printed: io.StringIO, clock: list[float]) -> None:
    with StageProgress("recover", 4, "units") as bar:
        clock[0] += 5
        bar.advance("too early for a line")
        clock[0] += 15
        bar.advance("unit-2")
        clock[0] += 10
    lines = printed.getvalue().splitlines()
    assert lines == [
        "recover    2/4 units, 20 s, 20 s left  unit-2",
        "recover    2/4 units, 30 s, 30 s left  unit-2",
    ]


def test_no_last_line_after_an_error(printed: io.StringIO, clock: list[float]) -> None:
    with pytest.raises(ValueError, match="stop"), StageProgress("recover", 4):
        raise ValueError("stop")
    assert printed.getvalue() == ""


def test_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=True, width=120))
    with StageProgress("squeeze", 3, "epochs") as bar:
        bar.set(3, "resnet18")
    assert "squeeze" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert "resnet18" in stream.getvalue()
