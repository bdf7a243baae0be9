"""What work takes, measured without Ray; the way to Prometheus is tested with the jobs (tests/pipeline)."""

from __future__ import annotations

import time

import pytest
import ray

from cluster.helpers import Helpers
from cluster.metrics import DriverMetrics, WorkerMetrics
from cluster.record import StageRecord
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row, run_serial


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return now


def test_without_ray_only_time_is_measured(clock, monkeypatch):
    metrics, spent = WorkerMetrics("recover", threads=4), {"cpu_seconds": 1.0}
    with metrics.unit(spent):
        clock[0] += 10
    assert spent == {"cpu_seconds": 41.0}
    monkeypatch.setattr(Helpers, "held", (2.0, 3))
    with metrics.unit(spent):
        clock[0] += 10
    assert spent == {"cpu_seconds": 41.0, "gpu_seconds": 20.0}
    DriverMetrics("recover").update(StageRecord(unit="units", planned=1), {"images": 3})


def test_rows_gather_what_all_stages_spent_failures_too(clock):
    def step(seconds: float, fail: str = ""):
        def work(row: Row) -> Row:
            clock[0] += seconds
            if row["id"] == fail:
                raise ValueError("no")
            return {"id": row["id"], "error": ""}

        return lambda: work

    stages = [
        ActorStage("one", step(5), resources=ActorResources(threads=2)),
        ActorStage("two", step(1, fail="b")),
    ]
    rows = list(run_serial([{"id": "a", "error": ""}, {"id": "b", "error": ""}], stages))
    assert [row["cpu_seconds"] for row in rows] == [11.0, 11.0]
    assert [bool(row["error"]) for row in rows] == [False, True]
