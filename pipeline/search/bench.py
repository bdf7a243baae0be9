"""From a point of the space and a rung to the configuration of a job, and what it is planned to cost."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import redact
from pipeline.config import Config
from pipeline.describe import cost
from pipeline.plan import REFERENCE_STEP_FLOPS, REFERENCE_STEP_S, make_plan
from pipeline.search.fields import overrides
from pipeline.search.measure import lighten, measure, reason_of
from pipeline.search.options import SearchOptions
from pipeline.search.space import Space
from stages.teachers.describe import NetworkFacts

log = logging.getLogger("prism")
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
    """

    space: Space
    options: SearchOptions
    networks: Mapping[str, NetworkFacts]
    students: Mapping[str, NetworkFacts]
    num_classes: int

    @property
    def rungs(self) -> list[dict[str, Any]]:
        """Overrides of every rung; with two objectives the last alone, since ASHA knows one."""
        return self.options.rungs if len(self.options.objectives) == 1 else self.options.rungs[-1:]

    @property
    def threads(self) -> int:
        """Of torch, in a job."""
        return max(1, int(self.options.cpus))

    def config(self, point: Mapping[str, Any], rung: int) -> Config:
        """Of a job."""
        at_point = self.space.apply(dict(point))
        return lighten(overrides(at_point, self.rungs[rung]), self.threads, self.options.seeds)

    def planned(self, point: Mapping[str, Any], rung: int) -> tuple[float, float]:
        """GPU-seconds of a job on the reference GPU: of the whole, and of recovery and labelling alone."""
        config = self.config(point, rung)
        found = cost(config, make_plan(config, self.num_classes), dict(self.networks), self.num_classes)
        distilling = 3600 * (found.recover_hours + found.relabel_hours)
        flops = PASSES_OF_TRAINING * sum(facts.flops for facts in self.students.values()) * len(self.options.seeds)
        training = flops * found.images * config.relabel.epochs / (REFERENCE_STEP_FLOPS / REFERENCE_STEP_S)
        return distilling + training, distilling


def make_work(root: str, bench: Bench) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What a job does, for ``cluster.tune``: fields of ``Measured``, or ``reason`` where it fails.

    Args:
        root: folder of the search.
        bench: of its jobs.
    """

    def work(job: dict[str, Any]) -> dict[str, Any]:
        try:
            found = measure(root, bench.config(job["point"], job["rung"]), job["key"])
        except Exception as error:
            # A point that fails is a result like another; the search goes on.
            log.error("%s: %s", job["key"], redact(traceback.format_exc()))
            return {"value": float("nan"), "reason": reason_of(error)}
        return {"value": found.top1, **found.model_dump(mode="json")}

    return work
