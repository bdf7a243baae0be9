"""What a search found: the best trial, how sure that is, and which settings it came from. Pure arithmetic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.search.options import SearchOptions
from pipeline.search.trial import Trial


def planned_rungs(options: SearchOptions) -> int:
    """Rungs of a trial that is not stopped: with two objectives the last one alone, which then is its first."""
    return 1 if len(options.objectives) > 1 else len(options.rungs)


def completed(trials: Sequence[Trial], rungs: int) -> list[Trial]:
    """Trials measured at the last of ``rungs`` that did not fail, by number."""
    found = [trial for trial in trials if len(trial.rungs) >= rungs and trial.state != "failed"]
    return sorted(found, key=lambda trial: trial.number)


def top1(trial: Trial) -> float:
    """Of the last measured rung."""
    return trial.rungs[-1].top1


def winner(trials: Sequence[Trial], rungs: int) -> Trial | None:
    """The completed trial of the highest top-1, of equal ones that of the lowest number; None where none completed."""
    return max(completed(trials, rungs), key=top1, default=None)


def ranked(trials: Sequence[Trial], rungs: int) -> list[Trial]:
    """All trials: those that came further first, then by top-1, then by number; failed ones last."""

    def key(trial: Trial) -> tuple[bool, int, float, int]:
        value = top1(trial) if trial.rungs else 0.0
        return trial.state == "failed", -min(len(trial.rungs), rungs), -value, trial.number

    return sorted(trials, key=key)


@dataclass(frozen=True)
class Progress:
    """A completed trial and the best one until then.

    Attributes:
        number: of the trial.
        seconds: that all trials up to this number took, stopped and failed ones included, added up.
        top1: of the trial.
        best: of all completed trials up to this number.
    """

    number: int
    seconds: float
    top1: float
    best: float


def best_so_far(trials: Sequence[Trial], rungs: int) -> list[Progress]:
    """One entry per completed trial, by number."""
    done = {trial.number for trial in completed(trials, rungs)}
    seconds, best = 0.0, -math.inf
    curve = []
    for trial in sorted(trials, key=lambda trial: trial.number):
        seconds += sum(rung.seconds for rung in trial.rungs)
        if trial.number in done:
            best = max(best, top1(trial))
            curve.append(Progress(trial.number, seconds, top1(trial), best))
    return curve


def pareto_front(trials: Sequence[Trial], rungs: int) -> list[Trial]:
    """Completed trials to which none is preferable in both top-1 and GPU-seconds, from the cheapest.

    Trials that are equal in both stay together.
    """
    done = completed(trials, rungs)

    def beats(one: Trial, other: Trial) -> bool:
        gain, cost = top1(one) - top1(other), one.rungs[-1].gpu_seconds - other.rungs[-1].gpu_seconds
        return gain >= 0 and cost <= 0 and (gain > 0 or cost < 0)

    front = [trial for trial in done if not any(beats(other, trial) for other in done)]
    return sorted(front, key=lambda trial: (trial.rungs[-1].gpu_seconds, trial.number))


# What made a difference


@dataclass(frozen=True)
class Mean:
    """Mean of a number of values, with its standard error, None below two."""

    value: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean | None:
        """None of no value."""
        if not values:
            return None
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))

    def minus(self, other: Mean) -> tuple[float, float | None]:
        """Difference and its standard error, sqrt(e₁² + e₂²), None where one of them is unknown."""
        error = None if self.error is None or other.error is None else math.hypot(self.error, other.error)
        return self.value - other.value, error


@dataclass(frozen=True)
class Effect:
    """A teacher in a list of teachers: top-1 at the cheapest rung with it and without it.

    Attributes:
        field: path of the list.
        teacher: name.
        inside, outside: of the trials whose list has it or not; None where there are none.
        difference: inside minus outside, None where one is lacking.
        error: its standard error, None where one side has fewer than two trials.
    """

    field: str
    teacher: str
    inside: Mean | None
    outside: Mean | None
    difference: float | None
    error: float | None


def teacher_effects(trials: Sequence[Trial]) -> list[Effect]:
    """For every searched list of names and every name in it, all that was measured at the cheapest rung.

    The means of two groups of trials: other settings differ between them too, all the more the longer the sampler has
    favoured some.
    """
    effects = []
    for field in dict.fromkeys(field for trial in trials for field in trial.point):
        points = [(t.point[field], t.rungs[0].top1) for t in trials if t.rungs and t.point.get(field) is not None]
        if not points or not all(isinstance(v, list) and all(isinstance(n, str) for n in v) for v, _ in points):
            continue
        for teacher in sorted({name for names, _ in points for name in names}):
            inside = Mean.of([value for names, value in points if teacher in names])
            outside = Mean.of([value for names, value in points if teacher not in names])
            difference, error = inside.minus(outside) if inside and outside else (None, None)
            effects.append(Effect(field, teacher, inside, outside, difference, error))
    return effects


# The result

Verdict = Literal["gain", "none", "loss", "unknown", "default"]


@dataclass(frozen=True)
class Gain:
    """Winner over default, from the full runs.

    Attributes:
        default, winner: means over seeds.
        difference: winner minus default, in points.
        error: its standard error, None with fewer than two seeds.
        verdict: ``none`` = less than two standard errors; ``unknown`` = there is no standard error; ``default`` = the
            default itself won.
        sentence: the verdict in words.
    """

    default: Mean
    winner: Mean
    difference: float
    error: float | None
    verdict: Verdict
    sentence: str


def gain(default: Sequence[float], winner: Sequence[float], number: int) -> Gain:
    """Compare the seeds' accuracies of two full runs.

    Args:
        default: top-1 of each seed, percent, at least one.
        winner: likewise; not looked at where the default won.
        number: of the trial that won; 0 = the default.

    Raises:
        ValueError: one of them is empty.
    """
    before, after = Mean.of(default), Mean.of(winner if number else default)
    if before is None or after is None:
        raise ValueError("no accuracies to compare")
    if number == 0:
        sentence = "The default itself is the winner: no trial did better."
        return Gain(before, before, 0.0, None, "default", sentence)
    difference, error = after.minus(before)
    verdict: Verdict
    if error is None:
        verdict = "unknown"
        sentence = (
            f"One seed does not tell whether trial {number} ({_points(difference)} points) differs from the default."
        )
    elif difference == 0 or abs(difference) < 2 * error:
        verdict = "none"
        sentence = (
            f"No difference that counts between trial {number} and the default: {_points(difference)} ± {error:.2f} "
            "points, less than two standard errors."
        )
    else:
        verdict = "gain" if difference > 0 else "loss"
        words = "is better" if difference > 0 else "is worse"
        sentence = f"Trial {number} {words} than the default by {abs(difference):.2f} ± {error:.2f} points."
    return Gain(before, after, difference, error, verdict, sentence)


def _points(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
