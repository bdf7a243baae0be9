"""Which teachers serve: the subset draw of PRISM, and the teachers of a single step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.rng import generator
from stages.recover.options import RecoverOptions
from stages.recover.unit import RecoverUnit


def draw_subset(
    pool: Sequence[str], primary: str, include_prob: float, max_bn_teachers: int, rng: np.random.Generator
) -> list[str]:
    """Draw a set of BN teachers by slots (PRISM, as released).

    The first slot holds the primary, or one of the pool at random where the primary is not in it, so the set is
    never empty. Every further slot is filled with chance ``include_prob``, uniformly from those not yet taken.
    With the published pool of five and four slots the number of extras is Binomial(3, ½) and each non-primary
    teacher is in with probability 0.375.

    Args:
        pool: names, without repeats, at least one.
        primary: the logit teacher.
        include_prob: chance that a further slot is filled.
        max_bn_teachers: slots, the first included.
        rng: consumed by the draw.

    Returns:
        Names in the order drawn.
    """
    left = list(pool)
    chosen = [left.pop(left.index(primary) if primary in left else int(rng.integers(len(left))))]
    for _ in range(max_bn_teachers - 1):
        if left and rng.random() < include_prob:
            chosen.append(left.pop(int(rng.integers(len(left)))))
    return chosen


def step_teachers(unit: RecoverUnit, options: RecoverOptions, step: int) -> tuple[list[str], list[str]]:
    """(logit teachers, BN teachers) of one step, a function of the unit's seed and the step alone.

    ``fixed`` and ``per_index`` use the unit's set at every step; ``per_step`` draws from it anew
    (intra-distillation); ``round_robin`` takes its member t mod n for both losses (G-VBSM).
    """
    pool = unit.bn_teachers
    if options.selection == "round_robin":
        one = pool[step % len(pool)]
        return [one], [one]
    if options.selection == "per_step":
        rng = generator(unit.seed, "bn-subset", step)
        pool = draw_subset(pool, unit.logit_teachers[0], options.include_prob, options.max_bn_teachers, rng)
    return unit.logit_teachers, pool
