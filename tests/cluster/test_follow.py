"""What is shown and recorded of work that blocks the driver."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cluster import progress, storage
from cluster.follow import follow
from cluster.record import read_record


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, highlight=False, width=200))
    return stream


def test_follow_sums_the_tasks_and_shows_the_latest(tmp_path: Path, printed: io.StringIO) -> None:
    uri = str(tmp_path / "progress")
    with follow(uri, "train", 10, "epochs"):
        old = {"done": 3, "total": 5, "message": "old", "time": 1, "seconds": 10.0, "gpus": 2.0}
        storage.write_json(storage.join(uri, "a.json"), old)
        new = {"done": 4, "total": 5, "message": "new", "time": 2, "seconds": 7.0, "cpus": 3.0}
        storage.write_json(storage.join(uri, "b.json"), new)
    assert printed.getvalue().splitlines() == ["train      7/10 epochs, 0 s, 0 s left  new"]
    record = read_record(uri)
    assert record
    assert (record.done, record.planned, record.gpu_seconds, record.cpu_seconds) == (7, 10, 20, 21)
    assert record.ended


def test_follow_passes_errors_on(tmp_path: Path, printed: io.StringIO) -> None:
    with pytest.raises(RuntimeError, match="worker"), follow(str(tmp_path), "train", 10, "epochs"):
        raise RuntimeError("worker")
