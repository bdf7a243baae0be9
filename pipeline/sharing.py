"""How many units of recovery share a GPU at the same time, found out when recovery starts (``resources.probe``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.capacity import read_capacity
from cluster.errors import PrismError, first_line
from cluster.progress import console
from cluster.resources import WORKER_BYTES, ActorResources
from cluster.runner import Row
from pipeline.context import Run, raise_failures
from stages.recover.probe_stage import probe_stage


def recover_resources(run: Run, rows: Sequence[Row]) -> ActorResources:
    """``resources.recover``, with the share of a GPU that the probe finds for these pending units, longest first.

    A probe that fails costs speed and nothing else, so recovery goes on without it.
    """
    resources = run.config.resources.recover
    if not run.config.resources.probe or run.serial or not rows:
        return resources
    capacity = read_capacity()
    if not capacity.gpus:
        return resources
    # With fewer units some GPUs would be left without any.
    most = int(min(len(rows), capacity.memory / WORKER_BYTES) // capacity.gpus)
    return resources.model_copy(update={"gpus": 1 / _measured(run, rows[0], most)}) if most > 1 else resources


def _measured(run: Run, row: Row, most: int) -> int:
    """Units at the same time that are fastest on the first GPU that comes."""
    config = run.config
    threads = config.resources.recover.threads
    stage = probe_stage(run.out, run.teachers, run.ready.data, config.recover, most, threads)
    _say("recover: measuring how many units at the same time are fastest on a GPU")
    found: list[Row] = []
    try:
        found = list(run.runner([row], [stage]))
        raise_failures("probe", found, 1)
        if stage.attempts is not None:
            stage.attempts.clear()
    except (PrismError, OSError) as error:
        reason = found[0]["error"] if found and found[0]["error"] else first_line(error)
        _say(f"warning: resources.probe: {reason}; every GPU has one unit at a time", style="yellow")
        return 1
    rates = ", ".join("out of memory" if math.isnan(rate) else f"{rate:.4g}" for rate in found[0]["rates"])
    _say(f"recover: {found[0]['workers']} at the same time (1, 2, 4 make {rates} image-steps/s)")
    return int(found[0]["workers"])


def _say(text: str, style: str | None = None) -> None:
    console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)
