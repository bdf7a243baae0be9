"""Which jobs a search has done, and in which order their results count.

A job is one rung of one trial. Jobs run wherever there is room; a sampler says where the next trial is, and successive
halving whether a trial goes on. Both depend on the order in which they hear of results, and that must not depend on
which machine was faster: so they hear of them in the order in which jobs would end on machines of nominal speed.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Any

from pipeline.search.trial import Measured, Trial

LOST = (
    "it failed again and again (search/tune/{}/error.txt says how), most likely for want of memory or of its machine; "
    "for fewer jobs on a machine search again with a larger search.cpus and another out"
)

Job = tuple[int, int]
"""Trial and rung."""


class Ladder:
    """Hands out jobs and keeps what came of them.

    Args:
        suggest: number of a trial → its params.
        observe: called with a trial when it has ended, before the next is suggested.
        goes_on: trial, rung, accuracy → whether the next rung is worth while.
        point: params → field of the configuration → value.
        planned: GPU-seconds of a point at a rung: of the whole job, and of the distillation.
        trials: how many.
        rungs: how many.
        parallel: machines of the virtual clock.
        tell: called with a trial whenever it has ended.
    """

    def __init__(
        self,
        suggest: Callable[[int], dict[str, Any]],
        observe: Callable[[Trial], None],
        goes_on: Callable[[int, int, float], bool],
        point: Callable[[dict[str, Any]], dict[str, Any]],
        planned: Callable[[dict[str, Any], int], tuple[float, float]],
        *,
        trials: int,
        rungs: int,
        parallel: int,
        tell: Callable[[Trial], None] = lambda trial: None,
    ):
        self._suggest, self._observe, self._goes_on = suggest, observe, goes_on
        self._point, self._planned, self._tell = point, planned, tell
        self._most, self._rungs = trials, rungs
        self._free, self._now = parallel, 0.0
        self.most_jobs = trials * rungs
        self.trials: list[Trial] = []
        # Virtual ends of the jobs that run, the next one first.
        self._ends: list[tuple[float, Job]] = []
        self._waiting: deque[Job] = deque()
        self._arrived: dict[Job, Measured | str] = {}
        self._advance()

    @property
    def finished(self) -> bool:
        """Whether all trials have ended."""
        return not self._ends

    def hand_out(self) -> dict[str, Any] | None:
        """The next job; None while that depends on results that are not there yet, or when all is done."""
        if not self._waiting:
            return None
        number, rung = self._waiting.popleft()
        return {
            "key": f"trial-{number:05d}-rung-{rung}",
            "trial": number,
            "rung": rung,
            "point": self.trials[number].point,
        }

    def take(self, key: Any, result: dict[str, Any] | None) -> None:
        """A job's result, which counts when its turn comes.

        Args:
            key: of the job.
            result: fields of ``Measured``, or the ``reason`` of a failure; None: it failed without a word of its own.
        """
        _, number, _, rung = str(key).split("-")
        job = int(number), int(rung)
        result = result or {"reason": LOST.format(key)}
        if result.get("reason"):
            self._arrived[job] = str(result["reason"])
        elif not math.isfinite(result["top1"]):
            self._arrived[job] = f"its accuracy is {result['top1']}"
        else:
            values = {name: result[name] for name in Measured.model_fields if name in result}
            _, distilling = self._planned(self.trials[job[0]].point, job[1])
            self._arrived[job] = Measured(**{**values, "gpu_seconds": distilling})
        self._advance()

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
        self._free -= 1
        self._start((number, 0))

    def _start(self, job: Job) -> None:
        number, rung = job
        whole, _ = self._planned(self.trials[number].point, rung)
        heapq.heappush(self._ends, (self._now + whole, job))
        self._waiting.append(job)

    def _count(self, number: int, rung: int, found: Measured | str) -> None:
        """A job's turn has come."""
        trial = self.trials[number]
        if isinstance(found, str):
            self._end(trial.model_copy(update={"state": "failed", "reason": found}))
            return
        trial = self.trials[number] = trial.model_copy(update={"rungs": [*trial.rungs, found]})
        worth = self._goes_on(number, rung, found.top1)
        if rung + 1 == self._rungs:
            self._end(trial.model_copy(update={"state": "finished"}))
        elif worth:
            self._start((number, rung + 1))
        else:
            self._end(trial.model_copy(update={"state": "stopped"}))

    def _end(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        self._observe(trial)
        self._free += 1
        self._tell(trial)
