"""The numbers of ``prism status`` as Ray metrics, for the dashboard and for Prometheus.

Workers say what they do at the moment, the driver what has been done. Without Ray, as under the serial runner, nothing
happens. Every metric has the tags ``stage`` and ``job``, Ray's id of the job, which tells runs on one cluster apart.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge, Histogram, Metric

from cluster.helpers import Helpers
from cluster.record import StageRecord, images_of

# Seconds; a unit takes from less than one on a small machine to an hour.
BOUNDARIES = [1.0, 3.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 3600.0, 10800.0]
# Half of Ray's interval between two reports.
REPEAT_S = 5.0
# Columns that a row gathers on its way through the stages.
SPENT = ("gpu_seconds", "cpu_seconds")
TAGS = ("stage", "job")


class WorkerMetrics:
    """What one worker of a stage does, and what it takes for it.

    Args:
        stage: name of the stage.
        threads: torch threads of the worker.
    """

    def __init__(self, stage: str, threads: int):
        self._gpus, self._threads = 0.0, threads
        self._on = ray.is_initialized()
        if not self._on:
            return
        context = ray.get_runtime_context()
        actor = context.get_actor_id() is not None
        if actor:
            self._gpus = float(context.get_assigned_resources().get("GPU", 0))
        self._running = _named(Gauge, "prism_units_running", "Units that workers have in hand.", stage)
        self._seconds = _named(
            Histogram, "prism_unit_seconds", "Seconds that a unit took in a stage.", stage, boundaries=BOUNDARIES
        )
        self._now = 0
        if actor:
            threading.Thread(target=self._repeat, name="metrics", daemon=True).start()

    def _hold(self, units: int) -> None:
        self._now = units
        self._running.set(units)

    def _repeat(self) -> None:
        """For the life of the actor: a gauge that is not set again is dropped after two reports; units last longer."""
        while True:
            self._running.set(self._now)
            time.sleep(REPEAT_S)

    @contextlib.contextmanager
    def unit(self, spent: dict[str, float]) -> Iterator[None]:
        """Measure a unit; adds what it took to ``gpu_seconds`` or, without a GPU, ``cpu_seconds`` of ``spent``."""
        start = time.monotonic()
        if self._on:
            self._hold(1)
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            gpus, threads = self._gpus + Helpers.held[0], float(self._threads + Helpers.held[1])
            kind, share = ("gpu_seconds", gpus) if gpus else ("cpu_seconds", threads)
            spent[kind] = spent.get(kind, 0.0) + share * seconds
            if self._on:
                self._hold(0)
                self._seconds.observe(seconds)


class DriverMetrics:
    """What has been done of a stage.

    Args:
        stage: name of the stage.
    """

    def __init__(self, stage: str):
        self._on = ray.is_initialized()
        if self._on:
            self._units = _named(Gauge, "prism_units", "Units: planned, done, failed.", stage, "state")
            self._retried = _named(Gauge, "prism_units_retried", "Starts of units beyond the first of each.", stage)
            self._images = _named(Counter, "prism_images", "Images distilled, or views labelled.", stage)
            self._loss = _named(Gauge, "prism_loss", "Cross-entropy of the unit that finished last.", stage)

    def update(self, record: StageRecord, row: Mapping[str, Any] | None = None) -> None:
        """Say where the stage is.

        Args:
            record: of the stage.
            row: of the unit that has just finished.
        """
        if not self._on:
            return
        for state, value in (("planned", record.planned), ("done", record.done), ("failed", record.num_failed)):
            self._units.set(value, tags={"state": state})
        self._retried.set(record.retried)
        if record.loss is not None:
            self._loss.set(record.loss)
        images = images_of(row or {})
        if images:
            self._images.inc(images)


def _named(kind: type[Metric], name: str, text: str, stage: str, *tags: str, **options: Any) -> Any:
    metric = kind(name, description=text, tag_keys=(*TAGS, *tags), **options)
    return metric.set_default_tags({"stage": stage, "job": ray.get_runtime_context().get_job_id()})
