"""What ``prism status`` says of living, dead and finished runs, from their directory alone."""

from __future__ import annotations

import io
import json
import re
import time
import uuid

import pytest
from rich.console import Console

from cluster import storage
from cluster.lease import LEASE_FILE, Lease
from cluster.progress import ProgressWriter
from cluster.record import RecordWriter
from pipeline import status_text
from pipeline.loading import load_config
from pipeline.rundir import claim
from pipeline.status import read_status
from pipeline.status_text import duration


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def out(request, tmp_path, tiny_config) -> str:
    """A run directory that has been claimed."""
    root = f"{tmp_path}/run"
    if request.param == "s3":
        root = f"{request.getfixturevalue('s3_server')}/{uuid.uuid4().hex}/run"
    claim(load_config(str(tiny_config(out=root))), {})
    return root


def commit(out: str, folder: str, count: int) -> None:
    for index in range(count):
        storage.write_bytes(storage.join(out, folder, f"x-{index:05d}.parquet"), b"")


def stages(out: str) -> dict:
    return {stage.name: stage for stage in read_status(out).stages}


def test_a_run_that_has_only_been_claimed(out, prism):
    code, text, err = prism("status", out)
    assert code == 0, err
    assert text.splitlines() == [
        f"run (prism) at {out}: stopped",
        "driver     none; run the same command again to go on",
        "squeeze    0/2 teachers",
        "recover    0/? units",
        "relabel    0/? label shards",
        "baseline   0/? label shards",
        "evaluate   0/3 students",
    ]


def test_no_run(tmp_path, prism):
    code, _, err = prism("status", tmp_path)
    assert code == 2
    assert "no run there" in err


def test_a_run_in_the_middle_of_a_stage(out, prism):
    tasks = storage.join(out, "progress", "recover")
    pending = [f"unit-{i}" for i in range(9)]
    with Lease(out), RecordWriter(tasks, "units", 2000, pending) as writer:
        for name in pending[:5]:
            ProgressWriter(tasks, name).update(40, 100, name, force=True, attempt=2)
        writer._start -= 7200
        for name in pending[:3]:
            writer.add({"id": name, "error": "", "attempt": 2, "gpu_seconds": 3600.0})
        writer.add({"id": pending[3], "error": "recover: the loss is not finite", "gpu_seconds": 1800.0})
        writer._write()
        code, text, err = prism("status", out)
        assert code == 0, err
        code, as_json, err = prism("status", out, "--json")
        assert code == 0, err
    lines = text.splitlines()
    assert lines[0] == f"run (prism) at {out}: running, in recover"
    assert lines[1].startswith("driver     process ")
    assert "last sign of life" in lines[1]
    # 1,991 were there before this session; 3 in two hours, and one unit that can be worked on has failed.
    assert lines[3] == (
        "recover    1,994/2,000 units, 1 running, 1 failed, 3 retried, 1.5 units an hour, 3 h 20 min left, "
        "3.5 GPU-hours"
    )
    assert re.search(r"^  unit-4: 40/100, \d+ s ago$", text, re.MULTILINE)
    assert "  failed: unit-3: recover: the loss is not finite" in lines
    assert lines[-1] == "spent      3.5 GPU-hours, 0 CPU-hours; 2 h in all (recover 2 h)"
    found = json.loads(as_json)
    assert (found["state"], found["stage"], found["driver"]["alive"]) == ("running", "recover", True)
    assert [task["task"] for task in found["running"]] == ["unit-4"]
    assert found["failed"] == [{"stage": "recover", "task": "unit-3", "reason": "recover: the loss is not finite"}]
    recover = found["stages"][1]
    assert (recover["done"], recover["planned"], recover["retried"]) == (1994, 2000, 3)
    assert recover["per_hour"] == pytest.approx(1.5, rel=0.01)
    assert recover["gpu_hours"] == pytest.approx(3.5)


def test_without_a_driver_what_is_committed_counts(out, prism):
    with RecordWriter(storage.join(out, "progress", "recover"), "units", 20, ["a", "b"]) as writer:
        writer.add({"id": "a", "error": ""})
    commit(out, "recovered", 20)
    commit(out, "labels/distilled", 3)
    found = stages(out)
    assert (found["recover"].done, found["recover"].planned) == (20, 20)
    assert found["relabel"].done == 3
    # Nobody works on it: no speed, and nothing is running.
    assert (found["recover"].per_hour, found["recover"].seconds_left, found["recover"].running) == (None, None, None)


def test_results_of_students_that_are_no_longer_asked_for_do_not_count(out):
    for name in ("prism--res--default--s0", "prism--other--default--s0", "prism--res--older--s0"):
        storage.write_json(storage.join(out, "eval", f"{name}.json"), {})
    found = stages(out)["evaluate"]
    assert (found.done, found.planned) == (1, 3)


def test_hours_of_the_baseline_count_once(out):
    storage.write_json(storage.join(out, "progress", "seconds.json"), {"relabel": 7200.0})
    with RecordWriter(storage.join(out, "progress", "baseline"), "shards", 1, []) as writer:
        writer.record.seconds = 3600.0
    found = stages(out)
    assert found["relabel"].wall_hours + found["baseline"].wall_hours == pytest.approx(2.0, abs=0.01)


def test_a_dead_driver_and_a_silent_one(out, prism):
    with Lease(out):
        record = storage.read_json(storage.join(out, LEASE_FILE))
    storage.write_json(storage.join(out, LEASE_FILE), record | {"process": "1"})
    _, text, _ = prism("status", out)
    assert "ended without a word; run the same command again to go on" in text
    storage.write_json(storage.join(out, LEASE_FILE), record | {"machine": "other", "time": time.time() - 7300})
    _, text, _ = prism("status", out)
    assert text.splitlines()[0].endswith(": stopped")
    assert "gave its last sign of life 2 h 1 min ago; if it is dead" in text


@pytest.mark.s3
def test_requests_do_not_grow_with_the_units(s3_server, tiny_config, monkeypatch):
    from aiobotocore.client import AioBaseClient

    out = f"{s3_server}/{uuid.uuid4().hex}/run"
    claim(load_config(str(tiny_config(out=out))), {})
    calls: list[str] = []
    call = AioBaseClient._make_api_call

    def counted(self, operation, arguments):
        calls.append(operation)
        return call(self, operation, arguments)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", counted)
    tasks = storage.join(out, "progress", "recover")
    numbers = []
    for count in (10, 100):
        names = [f"unit-{i}" for i in range(count)]
        commit(out, "recovered", count)
        with Lease(out, beat_s=60), RecordWriter(tasks, "units", 5000, names, interval_s=600) as writer:
            for name in names:
                writer.add({"id": name, "error": ""})
                ProgressWriter(tasks, name).update(1, 1)
            writer._write()
            calls.clear()
            assert read_status(out).stages[1].done == 5000
            numbers.append(len(calls))
        calls.clear()
        assert read_status(out).stages[1].done == count
        numbers.append(len(calls))
    assert numbers[:2] == numbers[2:]
    assert max(numbers) < 40


def test_watching_ends_with_the_driver(tmp_path, tiny_config, monkeypatch):
    out = str(tmp_path / "run")
    claim(load_config(str(tiny_config(out=out))), {})
    shown = io.StringIO()
    monkeypatch.setattr(status_text, "console", Console(file=shown, force_terminal=True, width=150))
    lease = Lease(out)
    with lease:
        monkeypatch.setattr(time, "sleep", lambda seconds: lease.release())
        status_text.print_status(out, read_status, status_text.lines, watch=True)
    assert "run (prism) at" in shown.getvalue()
    assert ": running" in shown.getvalue()
    assert ": stopped" in shown.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3600, "1 h"), (5399, "1 h 29 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words
