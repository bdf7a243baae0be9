"""From a point of the space and a rung to the configuration of a job, and what it is planned to cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import PrismError, TransientError
from pipeline.config import Config, DataConfig
from pipeline.describe import cost
from pipeline.plan import REFERENCE_STEP_FLOPS, REFERENCE_STEP_S, make_plan
from pipeline.search.fields import CLASSES, overrides, rung_fields
from pipeline.search.findings import planned_rungs
from pipeline.search.ladder import Ladder
from pipeline.search.measure import lighten, look_up, measure
from pipeline.search.options import SearchOptions
from pipeline.search.space import Space
from pipeline.search.trial import Measured, Trial
from stages.teachers.describe import NetworkFacts

# Forward, and backward to weights and inputs.
PASSES_OF_TRAINING = 3


@dataclass(frozen=True)
class Bench:
    """What all jobs of a search have in common.

    Attributes:
        space: over the configuration whose data are the search's.
        options: of the search.
        networks: teacher → facts of its architecture.
        students: the same of the students.
        num_classes: of the data.
        gpu: whether a job has one, or a part.
        subsets: number of classes → data of a rung with fewer than all; plans need none.
    """

    space: Space
    options: SearchOptions
    networks: Mapping[str, NetworkFacts]
    students: Mapping[str, NetworkFacts]
    num_classes: int
    gpu: bool = False
    subsets: Mapping[int, DataConfig] = field(default_factory=dict)

    @property
    def rungs(self) -> list[dict[str, Any]]:
        """Overrides of every rung; with two objectives the last alone, since ASHA knows one."""
        return self.options.rungs[-planned_rungs(self.options) :]

    @property
    def threads(self) -> int:
        """Of torch, in a job."""
        return max(1, int(self.options.cpus))

    def classes(self, rung: int) -> int:
        """How many of the data's classes a rung measures on."""
        return int(self.rungs[rung].get(CLASSES, self.num_classes))

    def config(self, point: Mapping[str, Any], rung: int) -> Config:
        """Of a job."""
        config, classes = self._settings(point, rung), self.classes(rung)
        return config if classes == self.num_classes else config.model_copy(update={"data": self.subsets[classes]})

    def _settings(self, point: Mapping[str, Any], rung: int) -> Config:
        """Of a job, with the data of all classes."""
        at_rung = overrides(self.space.apply(dict(point)), rung_fields(self.rungs[rung]))
        return lighten(at_rung, self.threads, self.gpu, self.options.seeds)

    def planned(self, point: Mapping[str, Any], rung: int) -> tuple[float, float]:
        """GPU-seconds of a job on the reference GPU: of the whole, and of recovery and labelling alone."""
        config, classes = self._settings(point, rung), self.classes(rung)
        found = cost(config, make_plan(config, classes), dict(self.networks), classes)
        distilling = 3600 * (found.recover_hours + found.relabel_hours)
        flops = PASSES_OF_TRAINING * sum(facts.flops for facts in self.students.values()) * len(self.options.seeds)
        training = flops * found.images * config.relabel.epochs / (REFERENCE_STEP_FLOPS / REFERENCE_STEP_S)
        return distilling + training, distilling

    def lesson(self, trial: Trial) -> Measured | None:
        """What a sampler hears of a trial that has ended; None: it failed.

        Trials end at rungs of different numbers of classes, and of few ones students guess more. So the accuracy is
        the students' on images of all classes, of which they get those that their rung left out wrong.
        """
        if trial.state == "failed":
            return None
        last, share = trial.rungs[-1], self.classes(len(trial.rungs) - 1) / self.num_classes
        return last.model_copy(update={"top1": last.top1 * share})


def make_work(root: str, bench: Bench) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What a job does, for ``cluster.tune``: fields of ``Measured``, or ``reason`` where its point cannot be measured.

    What else goes wrong, on the machine or in storage, is raised.

    Args:
        root: folder of the search.
        bench: of its jobs.
    """

    def work(job: dict[str, Any]) -> dict[str, Any]:
        try:
            found = measure(root, bench.config(job["point"], job["rung"]), job["key"])
        except TransientError:
            raise
        except PrismError as error:
            # A point that fails is a result like another; the search goes on.
            return {"value": float("nan"), "reason": str(error)}
        return {"value": found.top1, **found.model_dump(mode="json")}

    return work


class Remembered:
    """The jobs of a ladder that are not known from an earlier start.

    Args:
        ladder: of the search.
        root: folder of the search.
        bench: of its jobs.
    """

    def __init__(self, ladder: Ladder, root: str, bench: Bench):
        self._ladder, self._root, self._bench = ladder, root, bench
        self.most_jobs = ladder.most_jobs
        self._next: deque[dict[str, Any]] = deque()
        self._know()

    @property
    def finished(self) -> bool:
        """See ``Ladder``."""
        return self._ladder.finished

    def hand_out(self) -> dict[str, Any] | None:
        """See ``Ladder``."""
        return self._next.popleft() if self._next else None

    def take(self, key: Any, result: dict[str, Any] | None) -> None:
        """See ``Ladder``."""
        self._ladder.take(key, result)
        self._know()

    def _know(self) -> None:
        """Answer what is known, so that only the others wait to be handed out."""
        while job := self._ladder.hand_out():
            found = look_up(self._root, self._bench.config(job["point"], job["rung"]))
            if found:
                self._ladder.take(job["key"], found)
            else:
                self._next.append(job)
