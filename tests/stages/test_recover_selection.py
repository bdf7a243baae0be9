"""Subset draws against their exact law, and the teachers of single steps."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import permutations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.recover.options import RecoverOptions
from stages.recover.selection import draw_subset, step_teachers
from stages.recover.unit import RecoverUnit

POOL = ["resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5", "alexnet"]
HALF = Fraction(1, 2)


def exact_law(pool: list[str], primary: str, p: Fraction, slots: int) -> dict[frozenset[str], Fraction]:
    """Probability of every subset, by walking through all outcomes of all slots."""
    law: dict[frozenset[str], Fraction] = {}

    def walk(taken: tuple[str, ...], slot: int, chance: Fraction) -> None:
        if slot == slots:
            law[frozenset(taken)] = law.get(frozenset(taken), Fraction(0)) + chance
            return
        left = [n for n in pool if n not in taken]
        if not left:
            walk(taken, slot + 1, chance)
            return
        walk(taken, slot + 1, chance * (1 - p))
        for name in left:
            walk((*taken, name), slot + 1, chance * p / len(left))

    walk((primary,), 1, Fraction(1))
    return law


def test_exact_law_of_the_published_pool_is_binomial() -> None:
    law = exact_law(POOL, "resnet18", HALF, 4)
    assert sum(law.values()) == 1
    assert len(law) == 15
    for extras in range(4):
        share = sum(p for names, p in law.items() if len(names) == 1 + extras)
        assert share == Fraction(comb(3, extras), 8)
    for name in POOL[1:]:
        assert sum(p for names, p in law.items() if name in names) == Fraction(3, 8)


@pytest.mark.parametrize(
    ("pool", "p", "slots"),
    [(POOL, HALF, 4), (POOL[:3], HALF, 4), (POOL, Fraction(1, 5), 3), (POOL[:2], Fraction(1), 2)],
)
def test_draws_follow_the_exact_law(pool: list[str], p: Fraction, slots: int) -> None:
    draws = 20_000
    rng = np.random.default_rng(1)
    seen = Counter(frozenset(draw_subset(pool, pool[0], float(p), slots, rng)) for _ in range(draws))
    law = exact_law(pool, pool[0], p, slots)
    law = {names: chance for names, chance in law.items() if chance}
    assert set(seen) <= set(law)
    # Pearson's statistic has mean dof and variance 2·dof; six standard deviations above is no accident.
    dof = max(1, len(law) - 1)
    chi2 = sum((seen[n] - draws * float(q)) ** 2 / (draws * float(q)) for n, q in law.items())
    assert chi2 < dof + 6 * (2 * dof) ** 0.5


def test_extras_come_in_any_order() -> None:
    rng = np.random.default_rng(2)
    orders = Counter(tuple(draw_subset(POOL[:4], POOL[0], 1.0, 4, rng))[1:] for _ in range(6000))
    assert set(orders) == set(permutations(POOL[1:4]))
    assert max(orders.values()) < 1.2 * min(orders.values())


def test_primary_outside_the_pool_leaves_the_first_slot_to_chance() -> None:
    rng = np.random.default_rng(3)
    first = Counter(draw_subset(POOL, "other", 0.0, 4, rng)[0] for _ in range(5000))
    assert set(first) == set(POOL)
    assert max(first.values()) < 1.25 * min(first.values())


@given(
    size=st.integers(1, 8),
    p=st.floats(0, 1),
    slots=st.integers(1, 10),
    seed=st.integers(0, 2**32),
    inside=st.booleans(),
)
def test_properties(size: int, p: float, slots: int, seed: int, inside: bool) -> None:
    pool = [f"net{i}" for i in range(size)]
    primary = pool[seed % size] if inside else "other"
    drawn = draw_subset(pool, primary, p, slots, np.random.default_rng(seed))
    assert 1 <= len(drawn) <= min(size, slots)
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(pool)
    if inside:
        assert drawn[0] == primary
    assert drawn == draw_subset(pool, primary, p, slots, np.random.default_rng(seed))
    assert pool == [f"net{i}" for i in range(size)]


def unit(logit: list[str], bn: list[str], seed: int = 5) -> RecoverUnit:
    return RecoverUnit(ipc=0, chunk=0, classes=[0], logit_teachers=logit, bn_teachers=bn, iterations=9, seed=seed)


@pytest.mark.parametrize("selection", ["fixed", "per_index"])
def test_constant_selections_use_the_units_set(selection: str) -> None:
    options = RecoverOptions(selection=selection)  # type: ignore[arg-type]
    given_set = [POOL[0], POOL[3]]
    assert all(step_teachers(unit([POOL[0]], given_set), options, t) == ([POOL[0]], given_set) for t in range(9))


def test_round_robin_takes_one_network_for_both_losses() -> None:
    options = RecoverOptions(selection="round_robin")
    pool = POOL[:3]
    assert [step_teachers(unit(pool, pool), options, t) for t in range(7)] == [
        ([pool[t % 3]], [pool[t % 3]]) for t in range(7)
    ]


def test_per_step_draws_anew_by_seed_and_step_alone() -> None:
    options = RecoverOptions(selection="per_step")
    one, other = unit([POOL[0]], POOL), unit([POOL[0]], POOL, seed=6)
    steps = [step_teachers(one, options, t) for t in range(200)]
    assert steps == [step_teachers(one, options, t) for t in reversed(range(200))][::-1]
    assert steps != [step_teachers(other, options, t) for t in range(200)]
    assert all(logit == [POOL[0]] and bn[0] == POOL[0] for logit, bn in steps)
    extras = [len(bn) - 1 for _, bn in steps]
    assert set(extras) == {0, 1, 2, 3}
    assert abs(np.mean(extras) - 1.5) < 0.25
