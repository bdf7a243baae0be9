"""What a stage has done so far, in one small file of the run directory, whatever the number of its units.

The driver sees every unit finish and writes ``OUT/progress/STAGE.json`` every few seconds. Files of single units are
for those that run now: the driver removes a finished unit's once it is counted, so that a reader finds few of them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from cluster import storage
from cluster.progress import read_progress

# Reasons that are kept; the count goes on.
MAX_FAILED = 1000
MAX_POINTS = 64


class StageRecord(BaseModel):
    """What a stage has done, over all drivers that worked on it.

    Attributes:
        unit: what is counted.
        planned, done: of the whole stage.
        failed: units that failed in this session → reason; at most ``MAX_FAILED`` of them.
        num_failed: all of them.
        retried: starts of finished units beyond the first of each.
        gpu_seconds, cpu_seconds: devices, or where there is none torch threads, × seconds that work took.
        seconds: that drivers spent on the stage.
        session_seconds: that this driver has.
        points: (seconds of this session, units done), a few dozen, ascending; what speed is made from.
        images: finished in this session.
        loss: of the unit that finished last, None where there is no such thing.
        updated: when this was written, seconds since 1970 by the driver's clock.
        ended: the driver has left the stage.
        counted: units whose own files may still be there, though they are in the numbers above.
    """

    unit: str
    planned: float
    done: float = 0
    failed: dict[str, str] = {}
    num_failed: int = 0
    retried: int = 0
    gpu_seconds: float = 0
    cpu_seconds: float = 0
    seconds: float = 0
    session_seconds: float = 0
    points: list[tuple[float, float]] = []
    images: int = 0
    loss: float | None = None
    updated: float = 0
    ended: bool = False
    counted: list[str] = []

    def rate(self, window_s: float = 900.0, least: int = 5) -> float | None:
        """Units an hour over the last ``window_s`` seconds, over more where fewer than ``least`` units finished then.

        None: nothing has finished in this session.
        """
        if not self.points:
            return None
        now, done = self.session_seconds, self.points[-1][1]
        start = self.points[0]
        for point in self.points:
            if point[0] >= now - window_s or done - point[1] < least:
                break
            start = point
        hours = (now - start[0]) / 3600
        return (done - start[1]) / hours if done > start[1] and hours > 0 else None

    def seconds_left(self) -> float | None:
        """Time until all that is planned is done or failed, at the present rate."""
        rate = self.rate()
        return max(0.0, self.planned - self.done - self.num_failed) / rate * 3600 if rate else None


def images_of(row: Mapping[str, Any]) -> int:
    """Images that a finished unit is about, or views of them."""
    return int(row.get("images") or row.get("rows") or 0)


def read_record(tasks_uri: str) -> StageRecord | None:
    """The record of a stage, None where it has not begun.

    Args:
        tasks_uri: folder of the stage's units, ``OUT/progress/STAGE``.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):
        return StageRecord.model_validate(storage.read_json(f"{tasks_uri}.json"))
    return None


class RecordWriter:
    """Keeps the record of a stage while the driver works on it.

    Args:
        tasks_uri: ``OUT/progress/STAGE``: the folder of the units' own files, beside which the record lies.
        unit: what is counted.
        planned: of the whole stage.
        pending: ids of the units that are still to be done; None where progress is not by rows.
        interval_s: between two writes.
        on_write: told the record every so often, changed or not.
    """

    def __init__(
        self,
        tasks_uri: str,
        unit: str,
        planned: float,
        pending: Iterable[str] | None = None,
        interval_s: float = 5.0,
        on_write: Callable[[StageRecord], None] = lambda record: None,
    ):
        self._tasks, self._interval, self._on_write = tasks_uri, interval_s, on_write
        before = read_record(tasks_uri) or StageRecord(unit=unit, planned=planned)
        self._seconds = before.seconds
        self._spent = before.gpu_seconds, before.cpu_seconds
        self.record = before.model_copy(
            update={
                "unit": unit, "planned": planned, "done": 0.0, "failed": {}, "num_failed": 0, "images": 0, "points": [],
                "session_seconds": 0.0, "ended": False,
            }
        )  # fmt: skip
        # Units that are counted, whose files go with the next write.
        self._fresh: list[str] = []
        if pending is not None:
            waiting = set(pending)
            self.record.done = planned - len(waiting)
            self._settle(waiting)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="record", daemon=True)

    def __enter__(self) -> RecordWriter:
        self._start = time.monotonic()
        self.record.points = [(0.0, self.record.done)]
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        with self._lock:
            self.record.ended = True
        # The stage's own outcome matters more than this file.
        with contextlib.suppress(Exception):
            self._write()

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a unit that has left the pipeline."""
        with self._lock:
            record = self.record
            record.gpu_seconds += row.get("gpu_seconds") or 0.0
            record.cpu_seconds += row.get("cpu_seconds") or 0.0
            if row["error"]:
                record.num_failed += 1
                if len(record.failed) < MAX_FAILED:
                    record.failed[row["id"]] = str(row["error"])[:500]
                return
            record.done += 1
            record.retried += max(0, int(row.get("attempt") or 1) - 1)
            record.images += images_of(row)
            if row.get("loss_ce") is not None:
                record.loss = float(row["loss_ce"])
            self._point()
            self._fresh.append(row["id"])

    def move(self, done: float, gpu_seconds: float, cpu_seconds: float) -> None:
        """Move to ``done``; the seconds are those of this session."""
        with self._lock:
            if done != self.record.done:
                self.record.done = done
                self._point()
            self.record.gpu_seconds = self._spent[0] + gpu_seconds
            self.record.cpu_seconds = self._spent[1] + cpu_seconds

    def _point(self) -> None:
        points = self.record.points
        points.append((round(time.monotonic() - self._start, 3), self.record.done))
        if len(points) > MAX_POINTS:
            # Every other one of the older half: what is recent stays fine-grained.
            half = MAX_POINTS // 2
            points[:half] = points[:half:2]

    def _settle(self, waiting: set[str]) -> None:
        """Count what finished and an earlier driver did not live to see; its files go, and those of what is counted."""
        counted = set(self.record.counted)
        left = [name.removesuffix(".json") for name in storage.list_files(self._tasks, ".json")]
        done = [name for name in left if name not in waiting]
        unseen = read_progress(self._tasks, [name for name in done if name not in counted])
        self.record.retried += sum(max(0, int(task.get("attempt", 1)) - 1) for task in unseen.values())
        # A unit that is done again starts from a clean record.
        self._fresh = [*done, *(name for name in left if name in waiting and name in counted)]

    def _write(self) -> None:
        with self._lock:
            now = time.monotonic()
            self.record.session_seconds = round(now - self._start, 3)
            self.record.seconds = round(self._seconds + now - self._start, 3)
            self.record.updated = time.time()
            fresh = list(self._fresh)
            self.record.counted = fresh
            content = self.record.model_dump(mode="json")
        self._on_write(self.record)
        storage.write_json(f"{self._tasks}.json", content)
        # After they are counted: a driver that dies in between leaves them to the next one, which knows them.
        storage.remove_files(self._tasks, [f"{name}.json" for name in fresh])
        with self._lock:
            del self._fresh[: len(fresh)]

    def _keep(self) -> None:
        while not self._stop.wait(self._interval):
            # Storage that fails now may take the next one.
            with contextlib.suppress(Exception):
                self._write()
