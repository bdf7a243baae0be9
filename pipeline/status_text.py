"""The status of a run in words, or as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from rich.live import Live
from rich.text import Text

from cluster import storage
from cluster.progress import console
from pipeline.status import Driver, StageStatus, Status

SHOWN_TASKS, SHOWN_FAILED = 12, 10


class Shown(Protocol):
    """A status of whatever a directory holds."""

    @property
    def state(self) -> str:
        """``running``, ``stopped`` or ``finished``."""

    def model_dump_json(self) -> str:
        """One line."""


S = TypeVar("S", bound=Shown)


def print_status(
    out: str,
    read: Callable[[str], S],
    words: Callable[[S], Iterator[str]],
    *,
    as_json: bool = False,
    watch: bool = False,
) -> None:
    """Show what a directory holds.

    Args:
        out: the directory.
        read: looks at it.
        words: lines of a status.
        as_json: one line of JSON, the fields of the status.
        watch: again and again while a driver works on it.

    Raises:
        UserError: of ``read``.
    """

    def show() -> S:
        status = read(out)
        if as_json:
            print(status.model_dump_json(), flush=True)
        else:
            for line in words(status):
                console.print(line, soft_wrap=True, markup=False)
        return status

    if not watch:
        show()
        return
    pause = 2.0 if storage.is_local(out) else 15.0
    if as_json or not console.is_terminal:
        while show().state == "running":
            time.sleep(pause)
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            status = read(out)
            live.update(Text("\n".join(words(status))), refresh=True)
            if status.state != "running":
                return
            time.sleep(pause)


def lines(status: Status) -> Iterator[str]:
    """A run in words."""
    now = f", in {status.stage}" if status.stage else ""
    yield f"{status.name} ({status.recipe}) at {status.out}: {status.state}{now}"
    yield f"driver     {driver_words(status.driver, status.state)}"
    for stage in status.stages:
        names = f": {', '.join(status.teachers)}" if stage.name == "squeeze" and status.teachers else ""
        yield f"{stage.name:<10} {_stage_words(stage)}{names}"
    for task in status.running[:SHOWN_TASKS]:
        words = task.message if task.message != task.task else ""
        yield f"  {task.task}: {task.done:g}/{task.total:g} {words}, {duration(task.age)} ago".replace(" ,", ",")
    if len(status.running) > SHOWN_TASKS:
        yield f"  … and {len(status.running) - SHOWN_TASKS} more"
    for failure in status.failed[:SHOWN_FAILED]:
        yield f"  failed: {failure.task}: {failure.reason}"
    total = sum(stage.failed for stage in status.stages)
    if total > SHOWN_FAILED:
        yield f"  … and {total - SHOWN_FAILED} more failed"
    gpu, cpu, wall = status.spent
    parts = ", ".join(f"{s.name} {duration(3600 * s.wall_hours)}" for s in status.stages if s.wall_hours)
    if wall:
        yield f"spent      {gpu:.3g} GPU-hours, {cpu:.3g} CPU-hours; {duration(3600 * wall)} in all ({parts})"


def driver_words(driver: Driver | None, state: str) -> str:
    """Who works on it."""
    if driver is None:
        return "none" + ("" if state == "finished" else "; run the same command again to go on")
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(driver.since))
    who = f"process {driver.pid} on {driver.host}, since {since}"
    if driver.alive:
        return f"{who}, last sign of life {duration(max(0.0, driver.beat_age))} ago"
    if driver.dead:
        return f"none: {who}, ended without a word; run the same command again to go on"
    return (
        f"silent: {who}, gave its last sign of life {duration(driver.beat_age)} ago; if it is dead, run the same "
        "command again to go on"
    )


def _stage_words(stage: StageStatus) -> str:
    planned = "?" if stage.planned is None else f"{stage.planned:,}"
    words = [f"{stage.done:,}/{planned} {stage.unit}"]
    words += [f"{value:,} {name}" for name, value in (("running", stage.running), ("failed", stage.failed)) if value]
    words += [f"{stage.retried:,} retried"] if stage.retried else []
    if stage.per_hour:
        words.append(f"{stage.per_hour:,.3g} {stage.work} an hour")
    if stage.seconds_left is not None:
        words.append(f"{duration(stage.seconds_left)} left")
    words += [
        f"{hours:.3g} {kind}-hours" for kind, hours in (("GPU", stage.gpu_hours), ("CPU", stage.cpu_hours)) if hours
    ]
    return ", ".join(words)


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    for large, small, names in ((days, hours, "d h"), (hours, minutes, "h min"), (minutes, rest, "min s")):
        if large:
            first, second = names.split()
            return f"{large} {first} {small} {second}" if small else f"{large} {first}"
    return f"{rest} s"
