"""Which jobs a search has done, and in which order their results count.

A job is one rung of one trial. Ray Tune runs jobs wherever there is room; Optuna says where the next trial is, and
Ray's ASHA whether a trial goes on. Both depend on the order in which they hear of results, and that must not depend on
which machine was faster: so they hear of them in the order in which jobs would end on machines of nominal speed.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline.search.trial import Measured, Trial

LOST = "its process ended again and again, most likely for want of memory; lower search.parallel or a rung's settings"

Job = tuple[int, int]
"""Trial and rung."""


class Ladder(Searcher):
    """Hands out jobs to Tune and keeps what came of them.

    Args:
        suggest: number of a trial → its params; Optuna's, through Ray's ``OptunaSearch``.
        observe: tells Optuna how a trial ended: number, value of every objective, or None where it failed.
        point: params → field of the configuration → value.
        duration: planned GPU-seconds of a point at a rung: of the whole job, and of the distillation.
        trials: how many.
        rungs: how many.
        parallel: machines of the virtual clock.
        reduction_factor: of ASHA.
        tell: called with a trial whenever it has ended.
    """

    def __init__(
        self,
        suggest: Callable[[int], dict[str, Any]],
        observe: Callable[[int, Measured | None], None],
        point: Callable[[dict[str, Any]], dict[str, Any]],
        duration: Callable[[dict[str, Any], int], tuple[float, float]],
        *,
        trials: int,
        rungs: int,
        parallel: int,
        reduction_factor: float = 3.0,
        tell: Callable[[Trial], None] = lambda trial: None,
    ):
        super().__init__(metric="top1", mode="max")
        self._suggest, self._observe, self._point, self._duration, self._tell = suggest, observe, point, duration, tell
        self._most, self._rungs, self._factor = trials, rungs, reduction_factor
        self._free, self._now = parallel, 0.0
        # ASHA counts in resources, of which a rung has so many times those of the one before.
        self._asha = ASHAScheduler(
            time_attr="resource",
            metric="top1",
            mode="max",
            max_t=reduction_factor ** (rungs - 1),  # type: ignore[arg-type]
            grace_period=1,
            reduction_factor=reduction_factor,
        )
        self.trials: list[Trial] = []
        # Virtual ends of the jobs that run, the next one first.
        self._ends: list[tuple[float, Job]] = []
        self._waiting: deque[Job] = deque()
        self._handed: dict[str, Job] = {}
        self._arrived: dict[Job, Measured | str] = {}

    @property
    def most_jobs(self) -> int:
        """No more are ever handed out."""
        return self._most * self._rungs

    def suggest(self, trial_id: str) -> Any:
        """The next job for Tune, ``FINISHED``, or None while that depends on results that are not there yet."""
        self._advance()
        if self._waiting:
            number, rung = self._handed[trial_id] = self._waiting.popleft()
            return {"trial": number, "rung": rung, "point": self.trials[number].point}
        return None if self._ends else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A job is done; its result counts when its turn comes."""
        number, rung = job = self._handed.pop(trial_id)
        result = result or {"reason": LOST}
        if result.get("reason"):
            self._arrived[job] = str(result["reason"])
        elif not math.isfinite(result["top1"]):
            self._arrived[job] = f"its accuracy is {result['top1']}"
        else:
            values = {name: result[name] for name in Measured.model_fields if name in result}
            _, planned = self._duration(self.trials[number].point, rung)
            self._arrived[job] = Measured(**{**values, "gpu_seconds": planned})
        self._advance()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a job has one result, its last."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search that is started again finds what its jobs have left, see ADR 3."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a copy of its settings with every experiment; nobody reads it.
        return {}

    def _advance(self) -> None:
        """Let the clock run as far as results are there."""
        while True:
            while self._free and len(self.trials) < self._most:
                self._open()
            if not self._ends or self._ends[0][1] not in self._arrived:
                return
            self._now, (number, rung) = heapq.heappop(self._ends)
            self._count(number, rung, self._arrived.pop((number, rung)))

    def _open(self) -> None:
        number = len(self.trials)
        params = self._suggest(number)
        self.trials.append(Trial(number=number, params=params, point=self._point(params)))
        self._asha.on_trial_add(None, _named(number))  # type: ignore[arg-type]
        self._free -= 1
        self._start((number, 0))

    def _start(self, job: Job) -> None:
        number, rung = job
        whole, _ = self._duration(self.trials[number].point, rung)
        heapq.heappush(self._ends, (self._now + whole, job))
        self._waiting.append(job)

    def _count(self, number: int, rung: int, found: Measured | str) -> None:
        """A job's turn has come."""
        trial = self.trials[number]
        if isinstance(found, str):
            self._end(trial.model_copy(update={"state": "failed", "reason": found}))
            return
        trial = trial.model_copy(update={"rungs": [*trial.rungs, found]})
        self.trials[number] = trial
        result = {"resource": self._factor**rung, "top1": found.top1}
        goes_on = self._asha.on_trial_result(None, _named(number), result) == TrialScheduler.CONTINUE  # type: ignore[arg-type]
        if rung + 1 == self._rungs:
            self._end(trial.model_copy(update={"state": "finished"}))
        elif goes_on:
            self._start((number, rung + 1))
        else:
            self._end(trial.model_copy(update={"state": "stopped"}))

    def _end(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        self._observe(trial.number, None if trial.state == "failed" else trial.rungs[-1])
        self._free += 1
        self._tell(trial)


def _named(number: int) -> SimpleNamespace:
    """All that ASHA wants to know of a trial."""
    return SimpleNamespace(trial_id=str(number))
