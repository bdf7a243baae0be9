"""Progress that anyone can read from the run directory, and its display.

Workers write one small JSON file per task (``OUT/progress/STAGE/TASK.json``, at most once a second); the driver
shows them, and so can another process or machine.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cluster import storage

console = Console(stderr=False, highlight=False)


class ProgressWriter:
    """Says how far one task is.

    Args:
        uri: the progress folder of the stage.
        task: file-safe name of the task.
        interval_s: shortest time between two writes.
    """

    def __init__(self, uri: str, task: str, interval_s: float = 1.0):
        self._uri = storage.join(uri, f"{task}.json")
        self._interval = interval_s
        self._last = 0.0
        self._start = time.monotonic()

    def update(self, done: float, total: float, message: str = "", force: bool = False, **values: Any) -> None:
        """Record progress; calls closer than the interval are dropped unless ``force`` or finished."""
        now = time.monotonic()
        if not force and done < total and now - self._last < self._interval:
            return
        self._last = now
        record = {"done": done, "total": total, "message": message, "time": time.time()}
        storage.write_json(self._uri, {**record, "seconds": round(now - self._start, 3), **values})


def read_progress(uri: str, tasks: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Task name to its last record.

    Args:
        uri: the progress folder of the stage.
        tasks: names to read. None: all that are there.
    """
    if tasks is None:
        tasks = [name.removesuffix(".json") for name in storage.list_files(uri, ".json")]

    def read(task: str) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            return dict(storage.read_json(storage.join(uri, f"{task}.json")))
        return None

    # An object store takes as long for one as for a few at the same time.
    with ThreadPoolExecutor(8) as pool:
        records = dict(zip(tasks := list(tasks), pool.map(read, tasks), strict=True))
    return {task: record for task, record in records.items() if record is not None}


class StageProgress:
    """A bar with count, elapsed and remaining time; on a terminal it is live, elsewhere a line now and then."""

    def __init__(self, title: str, total: float, unit: str = ""):
        self.title, self.total, self.unit = title, total, unit
        self.done, self.message = 0.0, ""
        self._before = 0.0
        self._start = self._printed = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[message]}"),
                console=console,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=total, message="")

    def __enter__(self) -> StageProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()
        elif exc[0] is None:
            self._line()

    def resume(self, done: float) -> None:
        """``done`` were there before; they say nothing of the speed."""
        self._before = done
        if self._bar:
            self._bar.reset(self._task, completed=int(done), total=self.total)
        self.done = done

    def set(self, done: float, message: str = "") -> None:
        """Move to ``done``; ``message`` stands beside the bar."""
        self.done, self.message = done, message or self.message
        if self._bar:
            self._bar.update(self._task, completed=done, message=self.message)
        elif time.monotonic() - self._printed > 10:
            self._line()

    def advance(self, message: str = "") -> None:
        """One more done."""
        self.set(self.done + 1, message)

    def _line(self) -> None:
        self._printed = now = time.monotonic()
        spent = now - self._start
        here = self.done - self._before
        left = f", {spent / here * (self.total - self.done):.0f} s left" if here > 0 and self.done < self.total else ""
        count = f"{self.done:g}/{self.total:g} {self.unit}".strip()
        console.print(f"{self.title:<10} {count}, {spent:.0f} s{left}  {self.message}".rstrip(), soft_wrap=True)
