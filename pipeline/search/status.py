"""What a search has done and is doing, from its directory alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from cluster import storage
from pipeline import status_text
from pipeline.rundir import RUN_FILE
from pipeline.search.findings import planned_rungs, winner
from pipeline.search.report import read_final, read_search, readable
from pipeline.search.table import TRIALS_FILE, read_trials
from pipeline.search.trial import FOLDER, PREPARED, Trial, full_run
from pipeline.status import Driver, Status, read_driver
from pipeline.status import read_status as read_run_status


class Best(BaseModel):
    """A trial that was measured at the last rung.

    Attributes:
        number: of the trial.
        top1: on the search split, percent.
        point: path → value of the searched fields.
    """

    number: int
    top1: float
    point: dict[str, Any]


class SearchStatus(BaseModel):
    """A search.

    Attributes:
        name, out: of the search.
        state: ``running``, ``stopped`` or ``finished``.
        driver: None: nobody has it.
        planned: trials.
        reached: trials that were measured at each rung, from the cheapest.
        ended, failed: trials that will not go on, and those of them that failed.
        best, default: the best trial until now, and trial 0; None: not measured at the last rung.
        runs: of the teachers, and of the full runs, as far as they have begun.
    """

    name: str
    out: str
    state: str
    driver: Driver | None
    planned: int
    reached: list[int]
    ended: int
    failed: int
    best: Best | None
    default: Best | None
    runs: dict[str, Status]


def read_status(out: str) -> SearchStatus:
    """Look at the directory of a search, local or on an object store.

    Raises:
        UserError: ``out`` holds no search.
    """
    _, config, options = read_search(out)
    root, table = storage.join(out, FOLDER), storage.join(out, TRIALS_FILE)
    trials = read_trials(table) if storage.exists(table) else []
    rungs, driver = planned_rungs(options), read_driver(root)
    best = winner(trials, rungs)
    folders = dict.fromkeys([PREPARED, full_run(0), full_run(best.number if best else 0)])
    found = {folder: storage.join(root, *folder.split("/")) for folder in folders}
    ended = sum(trial.state != "running" for trial in trials)
    final = read_final(out)
    # That of a shorter search is not the end of a longer one.
    done = ended >= options.trials and final is not None and best is not None and final["number"] == best.number
    alive = driver is not None and driver.alive
    return SearchStatus(
        name=str(config.get("name", "search")),
        out=out,
        state="running" if alive else "finished" if done else "stopped",
        driver=driver,
        planned=options.trials,
        reached=[sum(len(trial.rungs) > rung for trial in trials) for rung in range(rungs)],
        ended=ended,
        failed=sum(trial.state == "failed" for trial in trials),
        best=_best(best, rungs),
        default=_best(trials[0] if trials else None, rungs),
        runs={
            folder: _run(folder, where)
            for folder, where in found.items()
            if storage.exists(storage.join(where, RUN_FILE))
        },
    )


def _run(folder: str, where: str) -> Status:
    """Of the run of the teachers, what it is for."""
    found = read_run_status(where)
    if folder != PREPARED:
        return found
    squeeze = found.stages[0]
    state = "finished" if found.state == "stopped" and squeeze.done == squeeze.planned else found.state
    return found.model_copy(update={"stages": [squeeze], "state": state})


def _best(trial: Trial | None, rungs: int) -> Best | None:
    if trial is None or len(trial.rungs) < rungs:
        return None
    return Best(number=trial.number, top1=trial.rungs[-1].top1, point=trial.point)


def lines(status: SearchStatus) -> Iterator[str]:
    """A search in words."""
    yield f"{status.name} at {status.out}: search, {status.state}"
    yield f"driver     {status_text.driver_words(status.driver, status.state)}"
    counts = ", ".join(f"{count} at rung {rung}" for rung, count in enumerate(status.reached, 1))
    failed = f", {status.failed} failed" if status.failed else ""
    yield f"trials     {status.ended}/{status.planned} ended; measured: {counts}{failed}"
    for label, best in (("best", status.best), ("default", status.default)):
        if best:
            point = ", ".join(f"{field} = {readable(value)}" for field, value in best.point.items())
            yield f"{label:<10} trial {best.number}: {best.top1:.2f} % ({point})"
    for run in status.runs.values():
        if any(stage.planned is None or stage.done < stage.planned for stage in run.stages):
            yield ""
            yield from status_text.lines(run)
