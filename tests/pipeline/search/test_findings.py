"""Findings against numbers computed by hand."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.search import findings
from pipeline.search.importance import MIN_TRIALS, importance, importances
from pipeline.search.options import Dimension, SearchOptions
from pipeline.search.trial import Measured, Trial


def trial(number: int, *values: float, state: str = "finished", cost: float = 1.0, seconds: float = 10.0,
          params: dict | None = None, point: dict | None = None) -> Trial:  # fmt: skip
    rungs = [Measured(top1=value, top1_seeds=[value], gpu_seconds=cost, seconds=seconds) for value in values]
    return Trial(number=number, params=params or {}, point=point or {}, rungs=rungs, state=state)


TWO_RUNGS = [
    trial(0, 20.0, 30.0),
    trial(1, 90.0, state="stopped"),
    trial(2, 21.0, 35.0),
    trial(3, 21.0, 35.0),
    trial(4, 22.0, 34.0, seconds=100.0),
    trial(5, 99.0, 99.0, state="failed"),
    trial(6, state="failed"),
]


def test_winner_is_the_first_of_the_best_at_the_last_rung():
    assert findings.winner(TWO_RUNGS, 2).number == 2
    assert findings.winner(TWO_RUNGS[::-1], 2).number == 2, "whatever the order they come in"
    assert findings.winner(TWO_RUNGS[:2], 2).number == 0
    assert findings.winner(TWO_RUNGS[1:2], 2) is None
    assert findings.winner(TWO_RUNGS[5:], 2) is None
    assert findings.winner([], 1) is None
    assert findings.winner([trial(0, 30.0), trial(1, 30.0)], 1).number == 0


def test_ranked():
    assert [t.number for t in findings.ranked(TWO_RUNGS, 2)] == [2, 3, 4, 0, 1, 5, 6]


def test_best_so_far():
    curve = findings.best_so_far(TWO_RUNGS[::-1], 2)
    # Seconds: 20, 30 (stopped), 50, 70, 270.
    assert curve == [
        findings.Progress(0, 20.0, 30.0, 30.0),
        findings.Progress(2, 50.0, 35.0, 35.0),
        findings.Progress(3, 70.0, 35.0, 35.0),
        findings.Progress(4, 270.0, 34.0, 35.0),
    ]
    assert findings.best_so_far([], 1) == []


def test_pareto_front_by_hand():
    trials = [
        trial(0, 30.0, cost=5.0),
        trial(1, 20.0, cost=1.0),
        trial(2, 30.0, cost=4.0),  # beats 0
        trial(3, 20.0, cost=2.0),  # beaten by 1
        trial(4, 40.0, cost=9.0),
        trial(5, 40.0, cost=9.0),  # equal to 4
        trial(6, 50.0, cost=1.0, state="failed"),
    ]
    assert [t.number for t in findings.pareto_front(trials, 1)] == [1, 2, 4, 5]
    assert findings.pareto_front([], 1) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_pareto_front_by_definition(points):
    trials = [trial(i, float(top1), cost=float(cost)) for i, (top1, cost) in enumerate(points)]
    front = {t.number for t in findings.pareto_front(trials, 1)}
    for i, (top1, cost) in enumerate(points):
        beaten = any((a >= top1 and c < cost) or (a > top1 and c <= cost) for a, c in points)
        assert (i in front) != beaten


def test_rungs_of_a_trial():
    space = {"recover.r_bn": {"log": [0.1, 1]}}
    assert findings.planned_rungs(SearchOptions(space=space, rungs=[{}, {}, {}])) == 3
    both = ["top1_last", "gpu_seconds"]
    assert findings.planned_rungs(SearchOptions(space=space, rungs=[{}, {}, {}], objectives=both)) == 1


# Teachers


def test_effects_by_hand():
    pool, logit = "recover.bn_teachers", "recover.logit_teachers"
    trials = [
        trial(0, 10.0, 50.0, point={pool: ["a", "b"], logit: ["a"], "recover.selection": "fixed"}),
        trial(1, 14.0, state="stopped", point={pool: ["a", "b"], logit: ["b"], "recover.selection": "fixed"}),
        trial(2, 6.0, state="stopped", point={pool: ["b"], "recover.selection": "per_index"}),
        trial(3, 4.0, state="failed", point={pool: ["b", "c"], "recover.selection": "per_index"}),
        trial(4, state="failed", point={pool: ["c"]}),
    ]
    effects = {(e.field, e.teacher): e for e in findings.teacher_effects(trials)}
    assert list(effects) == [(pool, "a"), (pool, "b"), (pool, "c"), (logit, "a"), (logit, "b")]
    a = effects[pool, "a"]
    # 10, 14: mean 12, s = √8, error √8/√2 = 2; 6, 4: mean 5, s = √2, error 1.
    assert (a.inside.value, a.inside.error, a.inside.count) == (12.0, pytest.approx(2.0), 2)
    assert (a.outside.value, a.outside.error, a.outside.count) == (5.0, pytest.approx(1.0), 2)
    assert (a.difference, a.error) == (7.0, pytest.approx(math.sqrt(5)))
    b = effects[pool, "b"]
    assert (b.inside.count, b.outside, b.difference, b.error) == (4, None, None, None), "it was never out"
    c = effects[pool, "c"]
    assert (c.inside.value, c.inside.error, c.difference, c.error) == (4.0, None, -6.0, None)
    assert effects[logit, "a"].difference == -4.0, "of the two trials that have the field"


def test_lists_of_other_things_are_no_teachers():
    assert findings.teacher_effects([trial(0, 1.0, point={"recover.betas": [0.5, 0.9]})]) == []
    assert findings.teacher_effects([]) == []


# The gain


def test_gain_by_hand():
    # Means 41 and 44; s² = 1 and 4; error √(1/3 + 4/2).
    found = findings.gain([40.0, 41.0, 42.0], [44.0 - math.sqrt(2), 44.0 + math.sqrt(2)], 7)
    assert found.difference == pytest.approx(3.0)
    assert found.error == pytest.approx(math.sqrt(1 / 3 + 4 / 2))
    assert found.verdict == "none"
    assert "less than two standard errors" in found.sentence
    better = findings.gain([40.0, 41.0, 42.0], [44.0, 45.0, 46.0], 7)
    assert (better.difference, better.error, better.verdict) == (4.0, pytest.approx(math.sqrt(2 / 3)), "gain")
    assert better.sentence == "Trial 7 is better than the default by 4.00 ± 0.82 points."
    worse = findings.gain([44.0, 45.0, 46.0], [40.0, 41.0, 42.0], 7)
    assert (worse.difference, worse.verdict) == (-4.0, "loss")
    assert worse.sentence == "Trial 7 is worse than the default by 4.00 ± 0.82 points."


def test_gain_at_its_edges():
    # Errors 3 and 4, together 5: exactly two of them count.
    assert findings.gain([-3.0, 3.0], [6.0, 14.0], 1).verdict == "gain"
    assert findings.gain([-3.0, 3.0], [5.9, 13.9], 1).verdict == "none"
    assert findings.gain([40.0, 40.0], [40.0, 40.0], 1).verdict == "none"
    assert findings.gain([40.0, 40.0], [40.5, 40.5], 1).verdict == "gain", "no spread at all"
    alone = findings.gain([40.0], [45.0, 46.0], 1)
    assert (alone.verdict, alone.error, alone.difference) == ("unknown", None, 5.5)
    same = findings.gain([40.0, 42.0], [], 0)
    assert (same.verdict, same.difference, same.winner) == ("default", 0.0, same.default)
    with pytest.raises(ValueError, match="no accuracies"):
        findings.gain([40.0], [], 1)


# Importance

SPACE = {"recover.r_bn": Dimension(log=(0.01, 100.0)), "recover.lr": Dimension(uniform=(0.0, 1.0)),
         "recover.roll": Dimension(integer=(0, 32)), "recover.bn_teachers": Dimension(subset=["a", "b"]),
         "recover.include_prob": Dimension(uniform=(0.0, 1.0), when={"recover.selection": ["per_index"]}),
         "recover.selection": Dimension(choice=["fixed", "per_index"])}  # fmt: skip


def searched(count: int, score, seed: int = 0) -> list[Trial]:
    """Random points of ``SPACE``, measured by ``score(params)``; one parameter is conditional."""
    draw = random.Random(seed)
    trials = []
    for number in range(count):
        params = {
            "recover.r_bn": 10 ** draw.uniform(-2, 2),
            "recover.lr": draw.random(),
            "recover.roll": draw.randint(0, 32),
            "recover.bn_teachers.a": draw.random() < 0.5,
            "recover.bn_teachers.b": draw.random() < 0.5,
            "recover.selection": draw.choice(["fixed", "per_index"]),
        }
        if params["recover.selection"] == "per_index":
            params["recover.include_prob"] = draw.random()
        trials.append(trial(number, score(params), params=params))
    return trials


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("recover.r_bn", lambda p: -abs(math.log10(p["recover.r_bn"]))),
        ("recover.roll", lambda p: p["recover.roll"]),
        ("recover.bn_teachers.b", lambda p: 5.0 * p["recover.bn_teachers.b"] + 0.1 * p["recover.lr"]),
        ("recover.selection", lambda p: 5.0 * (p["recover.selection"] == "fixed") + 0.1 * p["recover.lr"]),
        ("recover.include_prob", lambda p: p.get("recover.include_prob", 0.0)),
    ],
)
def test_the_parameter_that_decides_is_the_most_important(name, score):
    found = importance(searched(60, score), 1, SPACE)
    assert set(found.shares) == {*SPACE, "recover.bn_teachers.a", "recover.bn_teachers.b"} - {"recover.bn_teachers"}
    assert sum(found.shares.values()) == pytest.approx(1)
    assert next(iter(found.shares)) == name
    assert found.shares[name] > 2 * found.chance[name]
    assert (found.trials, found.best) == (60, 20)


def test_noise_hardly_ever_passes_chance():
    passed = total = 0
    for seed in range(6):
        noise = random.Random(seed)
        found = importance(searched(16, lambda _, noise=noise: noise.random(), seed), 1, SPACE)
        passed += sum(share > found.chance[name] for name, share in found.shares.items())
        total += len(found.shares)
    # Five percent of 42 are 2; more than 7 has a chance of 0.2 %.
    assert total == 42
    assert passed <= 7


def test_importance_is_a_function_of_the_table():
    trials = searched(24, lambda p: p["recover.lr"])
    first = importance(trials, 1, SPACE)
    assert importance(trials, 1, SPACE) == first
    assert list(first.shares) == list(importance(trials, 1, SPACE).shares)
    assert first.best == 8


def test_importance_takes_the_last_rung_with_enough_trials_and_the_cheapest():
    trials = searched(20, lambda p: p["recover.lr"])
    more = [t.model_copy(update={"rungs": t.rungs * (3 if i < 3 else 2 if i < 9 else 1)}) for i, t in enumerate(trials)]
    assert [(one.rung, one.trials) for one in importances(more, 3, SPACE)] == [(2, 9), (1, 20)]
    assert [(one.rung, one.trials) for one in importances(trials, 1, SPACE)] == [(1, 20)]
    assert [
        one.rung for one in importances([t.model_copy(update={"rungs": t.rungs * 3}) for t in trials], 3, SPACE)
    ] == [3, 1]
    assert importances(trials[: MIN_TRIALS - 1], 1, SPACE) == []
    assert importances([], 3, SPACE) == []


def test_trials_outside_the_space_do_not_count():
    trials = searched(MIN_TRIALS, lambda p: p["recover.lr"])
    outside = trials[0].model_copy(update={"params": {**trials[0].params, "recover.r_bn": 1e6}})
    assert importance([outside, *trials[1:]], 1, SPACE) is None
    assert importance([outside, *trials], 1, SPACE).trials == MIN_TRIALS
    assert importance([trial(9, 50.0), *trials], 1, SPACE).trials == MIN_TRIALS, "the configuration itself"


def test_nothing_differs():
    trials = [trial(n, 10.0 + n, params={"recover.selection": "fixed"}) for n in range(10)]
    found = importance(trials, 1, SPACE)
    assert (found.shares, found.chance) == ({}, {})


def test_values_that_are_equal_to_python_are_told_apart():
    trials = [trial(n, float(n % 2), params={"a.b": (1, True)[n % 2]}) for n in range(10)]
    assert importance(trials, 1, {}).shares == {"a.b": 1.0}


def test_importance_leaves_optunas_logging_alone():
    import optuna

    level = optuna.logging.get_verbosity()
    importance(searched(8, lambda p: p["recover.lr"]), 1, SPACE)
    assert optuna.logging.get_verbosity() == level
