"""What a search knows of a trial."""

from __future__ import annotations

from typing import Any, Literal

from cluster.resources import Frozen

State = Literal["running", "finished", "stopped", "failed"]


FOLDER, PREPARED, FINAL = "search", "base", "final"
"""A search's folder in its directory; in that, the run of its teachers, and the folder of the full runs."""


def full_run(number: int) -> str:
    """Path of a trial's full run below the search's folder, by its number: a longer search may have another winner."""
    return f"{FINAL}/trial-{number:05d}" if number else f"{FINAL}/default"


class Measured(Frozen):
    """One rung of one trial.

    Attributes:
        top1: accuracy of the students on the search split after the last epoch, percent, mean over seeds.
        top1_seeds: of each seed.
        gpu_seconds: planned, recovery and labelling (``prism plan``'s arithmetic); the ladder's to fill in.
        seconds: that it took where it was first measured.
        units: units of recovery that it needed.
        units_shared: of those, made for other trials or earlier.
    """

    top1: float
    top1_seeds: list[float]
    gpu_seconds: float = 0.0
    seconds: float
    units: int = 0
    units_shared: int = 0


class Trial(Frozen):
    """A point of the space and what was found there.

    Attributes:
        number: from 0, the configuration itself.
        params: as suggested, flat: ``recover.bn_teachers.vgg`` → True.
        point: field → value that it takes: ``recover.bn_teachers`` → [vgg, convnet].
        rungs: measured so far, from the cheapest.
        state: ``finished`` at the last rung, ``stopped`` before it, ``failed`` with a ``reason``.
        reason: one sentence.
    """

    number: int
    params: dict[str, Any]
    point: dict[str, Any]
    rungs: list[Measured] = []
    state: State = "running"
    reason: str = ""
