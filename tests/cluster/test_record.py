"""What a stage leaves for readers: counts that survive drivers, and few files."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from cluster import record, storage
from cluster.progress import ProgressWriter
from cluster.record import RecordWriter, StageRecord, read_record


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def tasks(request, tmp_path) -> str:
    root = str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3_server')}/{uuid.uuid4().hex}"
    return storage.join(root, "progress", "recover")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "recover")


def row(name: str, **values: Any) -> dict[str, Any]:
    return {"id": name, "error": "", **values}


def files(tasks: str) -> list[str]:
    return [name.removesuffix(".json") for name in storage.list_files(tasks)]


def start(tasks: str, *names: str, **values: Any) -> None:
    for name in names:
        ProgressWriter(tasks, name).update(5, 5, **{"attempt": 1, **values})


def test_rows_are_summed_and_finished_units_leave_no_files(tasks):
    with RecordWriter(tasks, "units", 10, ["a", "b", "c", "d"]) as writer:
        start(tasks, "a", "b", "c", "d")
        writer.add(row("a", gpu_seconds=30.0, attempt=3, images=7, loss_ce=0.5))
        writer.add(row("b", gpu_seconds=6.0, cpu_seconds=1.0, attempt=1, images=7, loss_ce=0.25))
        writer.add({"id": "c", "error": "recover: the loss is not finite", "gpu_seconds": 4.0})
    found = read_record(tasks)
    assert found
    assert (found.unit, found.planned, found.done, found.num_failed) == ("units", 10, 8, 1)
    assert found.failed == {"c": "recover: the loss is not finite"}
    assert (found.gpu_seconds, found.cpu_seconds, found.retried, found.images, found.loss) == (40, 1, 2, 14, 0.25)
    assert found.ended
    # A unit that failed keeps its number of starts, and one that runs says how far it is.
    assert files(tasks) == ["c", "d"]


def test_the_next_driver_goes_on_counting(tasks):
    with RecordWriter(tasks, "units", 3, ["a", "b", "c"]) as writer:
        writer.add(row("a", cpu_seconds=2.0, attempt=2))
        writer.add({"id": "b", "error": "no memory", "cpu_seconds": 1.0})
    before = read_record(tasks)
    with RecordWriter(tasks, "units", 3, ["b", "c"]) as writer:
        writer.add(row("b", cpu_seconds=5.0, attempt=2))
    found = read_record(tasks)
    assert before
    assert found
    assert (found.done, found.num_failed, found.failed) == (2, 0, {})
    assert (found.retried, found.cpu_seconds) == (2, 8)
    assert found.seconds > before.seconds
    assert found.seconds == pytest.approx(before.seconds + found.session_seconds, abs=0.01)


def test_a_driver_that_dies_loses_and_doubles_no_retries(tasks, monkeypatch):
    writer = RecordWriter(tasks, "units", 4, ["a", "b", "c", "d"])
    writer._start = time.monotonic()
    start(tasks, "a", "b", "c", attempt=2)
    writer.add(row("a", attempt=2))

    # Dies when "a" is counted but its file is there, "b" is committed and not yet counted, and "c" runs.
    def die(uri: str, names: list[str]) -> None:
        raise OSError("died")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove_files", die)
        with pytest.raises(OSError, match="died"):
            writer._write()
    assert files(tasks) == ["a", "b", "c"]
    with RecordWriter(tasks, "units", 4, ["c", "d"]) as writer:
        assert files(tasks) == ["c"]
        assert writer.record.done == 2
        writer.add(row("c", attempt=3))
        writer.add(row("d", attempt=1))
    found = read_record(tasks)
    assert found
    assert found.retried == 1 + 1 + 2
    assert files(tasks) == []


def test_a_unit_that_is_done_again_starts_from_a_clean_record(folder):
    writer = RecordWriter(folder, "units", 1, ["a"])
    writer._start = time.monotonic()
    storage.write_json(f"{folder}.json", StageRecord(unit="units", planned=1, done=1, counted=["a"]).model_dump())
    start(folder, "a", attempt=2)
    with RecordWriter(folder, "units", 1, ["a"]):
        assert files(folder) == []


def test_it_is_written_while_units_run(folder):
    with RecordWriter(folder, "units", 2, ["a", "b"], interval_s=0.01) as writer:
        writer.add(row("a"))
        while (found := read_record(folder)) is None or found.done != 1:
            time.sleep(0.01)
        assert not found.ended


def test_storage_that_fails_for_a_while_costs_nothing(folder, monkeypatch):
    tried = []
    write = storage.write_json

    def flaky(uri: str, value: object) -> None:
        tried.append(uri)
        if 2 <= len(tried) <= 4:
            raise OSError("503 SlowDown")
        write(uri, value)

    start(folder, "a", "b")
    monkeypatch.setattr(storage, "write_json", flaky)
    with RecordWriter(folder, "units", 2, ["a", "b"], interval_s=0.01) as writer:
        writer.add(row("a"))
        while len(tried) < 6:
            time.sleep(0.01)
        assert files(folder) == ["b"]
        writer.add(row("b"))
    assert files(folder) == []
    assert read_record(folder).done == 2  # type: ignore[union-attr]


def test_size_does_not_grow_with_the_units(folder):
    names = [f"unit-{index:05d}" for index in range(20_000)]
    with RecordWriter(folder, "units", len(names), names) as writer:
        for index, name in enumerate(names):
            writer.add(row(name) if index % 2 else {"id": name, "error": "x" * 10_000})
        writer._write()
        # The next one, for whom nothing has finished since.
        writer._write()
        found = read_record(folder)
        assert found
        assert (found.done, found.num_failed, len(found.failed)) == (10_000, 10_000, record.MAX_FAILED)
        assert len(found.points) <= record.MAX_POINTS
        assert found.counted == []
    assert Path(f"{folder}.json").stat().st_size < 10**6


def points(*pairs: tuple[float, float], **values: Any) -> StageRecord:
    return StageRecord(unit="units", planned=1000, points=list(pairs), **values)


def test_speed_is_that_of_the_recent_past():
    # 100 units in the first hour, then 10 every 10 minutes.
    steps = [(0.0, 0.0), (3600.0, 100.0), *((3600.0 + 600 * i, 100.0 + 10 * i) for i in range(1, 13))]
    found = points(*steps, done=220, session_seconds=10_800)
    assert found.rate(window_s=1800) == pytest.approx(60)
    assert found.seconds_left() == pytest.approx((1000 - 220) / 60 * 3600)
    # Nothing for an hour lowers it.
    stalled = points(*steps, done=220, session_seconds=14_400)
    assert stalled.rate(window_s=1800) == pytest.approx(10 / 4200 * 3600)


def test_speed_of_few_long_units_is_that_of_the_session():
    found = points((0, 40), (1800, 41), (3600, 42), done=42, session_seconds=3600)
    assert found.rate() == pytest.approx(2)
    assert points((0, 40), done=40, session_seconds=3600).rate() is None
    assert points((0, 40), done=40, session_seconds=3600).seconds_left() is None


def test_thinned_points_keep_the_ends(folder):
    with RecordWriter(folder, "units", 500, [str(i) for i in range(500)]) as writer:
        for index in range(500):
            writer.add(row(str(index)))
        kept = writer.record.points
        assert kept[0] == (0, 0)
        assert kept[-1][1] == 500
        assert [done for _, done in kept[-20:]] == list(range(481, 501))
        assert kept == sorted(kept)
