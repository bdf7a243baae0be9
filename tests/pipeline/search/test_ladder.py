"""The order of a search: the same table whatever arrives first, ASHA's and Optuna's decisions, failures."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.tune import Halving, Sampler
from pipeline.search.ladder import LOST, Ladder
from pipeline.search.trial import Measured, Trial

TRIALS, RUNGS = 12, 3
FIRST = {"recover.r_bn": 1.0, "recover.bn_teachers.vgg": True}


def space(trial: Any) -> dict[str, Any]:
    return {
        "recover.r_bn": trial.suggest_float("recover.r_bn", 0.01, 100, log=True),
        "recover.bn_teachers.vgg": trial.suggest_categorical("recover.bn_teachers.vgg", [False, True]),
    }


def accuracy(point: dict[str, Any], rung: int) -> float:
    """Best near r_bn = 3, a little better with vgg; dearer rungs see more."""
    return 40 + 10 * rung - 5 * (math.log10(point["recover.r_bn"]) - 0.5) ** 2 + point["recover.bn_teachers.vgg"]


def planned(point: dict[str, Any], rung: int) -> tuple[float, float]:
    distilling = 3.0**rung * (1 + point["recover.bn_teachers.vgg"])
    return distilling + 0.5, distilling


def make(parallel: int = 3, kind: str = "tpe", told: list[Trial] | None = None, **changes: Any) -> Ladder:
    given = {"trials": TRIALS, "rungs": RUNGS, "objectives": {"top1": "max"}, **changes}
    objectives = given.pop("objectives")
    sampler = Sampler(space, FIRST, kind, objectives, given["trials"], 7)

    def observe(trial: Trial) -> None:
        found = trial.rungs[-1] if trial.state != "failed" else None
        sampler.observe(trial.number, {name: getattr(found, name) for name in objectives} if found else None)

    tell = told.append if told is not None else lambda trial: None
    halving = Halving(given["rungs"], 3.0)
    return Ladder(sampler.suggest, observe, halving.goes_on, dict, planned, parallel=parallel, tell=tell, **given)


def climb(ladder: Ladder, order: random.Random, room: int, result: Any = None) -> list[Trial]:
    """Run all jobs as a cluster with room for so many would, which end in any order."""
    running: dict[str, dict[str, Any]] = {}
    count = 0
    while not ladder.finished:
        while len(running) < room and (job := ladder.hand_out()):
            running[job["key"]] = job
            count += 1
        job = running.pop(order.choice(sorted(running)))
        if result is None:
            top1 = accuracy(job["point"], job["rung"])
            found: Any = {"top1": top1, "top1_seeds": [top1], "seconds": 1.0, "training_iteration": 1}
        else:
            found = result(job)
        ladder.take(job["key"], found)
    assert not running
    assert ladder.hand_out() is None
    assert count <= ladder.most_jobs
    return ladder.trials


REFERENCE = climb(make(), random.Random(0), 3)


@settings(max_examples=20)
@given(st.randoms(use_true_random=False), st.integers(1, 6))
def test_the_table_does_not_depend_on_what_ends_first(order: random.Random, room: int) -> None:
    """Nor on how many jobs the cluster really runs at a time."""
    assert climb(make(), order, room) == REFERENCE


def test_virtual_machines_are_part_of_the_search() -> None:
    assert climb(make(parallel=1), random.Random(0), 3) != REFERENCE


def test_trial_0_is_the_configuration_itself() -> None:
    assert REFERENCE[0].params == FIRST


def test_few_trials_reach_the_last_rung() -> None:
    reached = [sum(len(trial.rungs) > rung for trial in REFERENCE) for rung in range(RUNGS)]
    assert reached[0] == TRIALS
    assert TRIALS > reached[1] > reached[2] >= 1
    for trial in REFERENCE:
        assert trial.state == ("finished" if len(trial.rungs) == RUNGS else "stopped")


def test_a_trial_goes_on_when_it_is_in_the_best_third_of_what_was_seen() -> None:
    """Ray's ASHA: at least the percentile of those before it, on one virtual machine in order of their number."""
    seen: list[float] = []
    for trial in climb(make(parallel=1, kind="random"), random.Random(0), 1):
        top1 = trial.rungs[0].top1
        if seen:
            ordered = sorted(seen)
            at = (1 - 1 / 3) * (len(ordered) - 1)
            low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
            cutoff = low + (high - low) * (at - math.floor(at))
            assert (len(trial.rungs) > 1) == (top1 >= cutoff)
        seen.append(top1)


def test_every_trial_is_told_once_when_it_has_ended() -> None:
    told: list[Trial] = []
    trials = climb(make(told=told), random.Random(3), 2)
    assert sorted(told, key=lambda trial: trial.number) == trials


def test_planned_cost_is_that_of_the_distillation() -> None:
    for trial in REFERENCE:
        assert [rung.gpu_seconds for rung in trial.rungs] == [
            planned(trial.point, r)[1] for r in range(len(trial.rungs))
        ]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"top1": math.nan, "reason": "teacher vgg gives logits that are not finite"}, "teacher vgg gives logits"),
        ({"top1": math.nan, "top1_seeds": [math.nan], "seconds": 1.0}, "its accuracy is nan"),
        (None, LOST),
    ],
)
def test_failed_trials_say_why_and_the_others_go_on(bad: Any, reason: str) -> None:
    """Those with vgg fail at the second rung."""

    def result(job: dict[str, Any]) -> Any:
        if job["rung"] == 1 and job["point"]["recover.bn_teachers.vgg"]:
            return bad
        top1 = accuracy(job["point"], job["rung"])
        return {"top1": top1, "top1_seeds": [top1], "seconds": 1.0}

    trials = climb(make(), random.Random(1), 3, result)
    assert len(trials) == TRIALS
    failed = [trial for trial in trials if trial.state == "failed"]
    assert failed
    for trial in failed:
        assert reason.format(f"trial-{trial.number:05d}-rung-1") in trial.reason
        assert len(trial.rungs) == 1
        assert trial.params["recover.bn_teachers.vgg"]
    assert any(trial.state == "finished" for trial in trials)


def test_a_longer_search_begins_with_the_shorter_one() -> None:
    """So that search.trials may be raised later, where the sampler does not plan ahead."""

    short, long = (climb(make(kind="random", trials=count), random.Random(0), 2) for count in (TRIALS, 20))
    assert [trial.params for trial in long][:TRIALS] == [trial.params for trial in short]


def test_two_objectives_go_through_nsga() -> None:
    trials = climb(make(rungs=1, objectives={"top1": "max", "gpu_seconds": "min"}), random.Random(0), 2)
    assert {trial.state for trial in trials} == {"finished"}
    assert all(isinstance(trial.rungs[0], Measured) for trial in trials)
