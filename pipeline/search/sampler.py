"""Optuna, as Ray Tune wraps it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from ray.tune.search.optuna import OptunaSearch

from cluster import rng
from pipeline.search.trial import Measured

MODES = {"top1": "max", "gpu_seconds": "min"}


class Sampler:
    """Suggests where the next trial is.

    Args:
        space: asks a trial of Optuna's for every parameter; returns them.
        first: params of trial 0.
        kind: ``tpe`` or ``random``; with two objectives ``tpe`` is NSGA-II.
        objectives: names of fields of ``Measured``.
        trials: how many there will be.
        seed: of all choices.
    """

    def __init__(
        self,
        space: Callable[[Any], dict[str, Any]],
        first: dict[str, Any],
        kind: str,
        objectives: Sequence[str],
        trials: int,
        seed: int,
    ):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._objectives = list(objectives)
        names = self._objectives[0] if len(objectives) == 1 else self._objectives
        modes = [MODES[name] for name in objectives]
        with warnings.catch_warnings():
            # Of samplers that Optuna still calls experimental.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = _sampler(kind, len(objectives), trials, rng.derive_seed(seed, "search") % 2**32)
        self._search = OptunaSearch(
            space=space,
            metric=names,
            mode=modes[0] if len(modes) == 1 else modes,
            points_to_evaluate=[first],
            sampler=sampler,
        )

    def suggest(self, number: int) -> dict[str, Any]:
        """Params of a trial."""
        found: dict[str, Any] | None = self._search.suggest(str(number))
        assert found is not None
        return found

    def observe(self, number: int, found: Measured | None) -> None:
        """How a trial ended; None: it failed."""
        values = {name: getattr(found, name) for name in self._objectives} if found else None
        self._search.on_trial_complete(str(number), values, error=found is None)


def _sampler(kind: str, objectives: int, trials: int, seed: int) -> optuna.samplers.BaseSampler:
    if kind == "random":
        return optuna.samplers.RandomSampler(seed)
    if objectives > 1:
        # A generation must be smaller than the search, or nothing is ever learnt.
        return optuna.samplers.NSGAIISampler(population_size=max(4, min(50, trials // 4)), seed=seed)
    # Groups, for not every trial has every parameter; those that still run count as bad, so that others look elsewhere.
    return optuna.samplers.TPESampler(
        seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=min(10, max(2, trials // 3))
    )
