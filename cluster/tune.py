"""Ray Tune for a search that orders its own jobs: Optuna suggests, ASHA decides, and jobs run where there is room.

Which job is next, and in which order results count, is the search's business (``Jobs``).
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import optuna
from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from tenacity import Retrying, stop_after_attempt

from cluster import rng, storage
from cluster.errors import RunError, first_line, redact

EXPERIMENT = "tune"
# A job that raised, or whose process died, is run again so often.
RESTARTS = 2
Work = Callable[[dict[str, Any]], dict[str, Any]]
"""What a job does."""


class Sampler:
    """Suggests where the next trial is: Optuna, as Ray Tune wraps it.

    Args:
        space: asks a trial of Optuna's for every parameter; returns them.
        first: params of trial 0.
        kind: ``tpe`` or ``random``; with two objectives ``tpe`` is NSGA-II.
        objectives: name → ``max`` or ``min``.
        trials: how many there will be.
        seed: of all choices.
    """

    def __init__(
        self,
        space: Callable[[Any], dict[str, Any]],
        first: dict[str, Any],
        kind: str,
        objectives: Mapping[str, str],
        trials: int,
        seed: int,
    ):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        names, modes = list(objectives), list(objectives.values())
        with warnings.catch_warnings():
            # Of what Optuna still calls experimental.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = _sampler(kind, len(names), trials, rng.derive_seed(seed, "search") % 2**32)
        self._search = OptunaSearch(
            space=space,
            metric=names[0] if len(names) == 1 else names,
            mode=modes[0] if len(names) == 1 else modes,
            points_to_evaluate=[first],
            sampler=sampler,
        )

    def suggest(self, number: int) -> dict[str, Any]:
        """Params of a trial."""
        found: dict[str, Any] | None = self._search.suggest(str(number))
        assert found is not None
        return found

    def observe(self, number: int, values: dict[str, float] | None) -> None:
        """How a trial ended: its objectives; None: it failed."""
        self._search.on_trial_complete(str(number), values, error=values is None)


def _sampler(kind: str, objectives: int, trials: int, seed: int) -> optuna.samplers.BaseSampler:
    if kind == "random":
        return optuna.samplers.RandomSampler(seed)
    if objectives > 1:
        # A generation must be smaller than the search, or nothing is ever learnt.
        return optuna.samplers.NSGAIISampler(population_size=max(4, min(50, trials // 4)), seed=seed)
    # Groups, for not every trial has every parameter. Trials that still run count as bad, so others look elsewhere.
    return optuna.samplers.TPESampler(
        seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=min(10, max(2, trials // 3))
    )


class Halving:
    """Whether a trial goes on to the next rung: Ray's ASHA (Li et al. 2020, stopping variant).

    Args:
        rungs: how many.
        reduction_factor: about one in so many goes on.
    """

    def __init__(self, rungs: int, reduction_factor: float):
        self._factor = reduction_factor
        # ASHA counts in resources, of which a rung has so many times those of the one before.
        self._asha = ASHAScheduler(
            time_attr="resource",
            metric="value",
            mode="max",
            max_t=reduction_factor ** (rungs - 1),  # type: ignore[arg-type]
            grace_period=1,
            reduction_factor=reduction_factor,
        )
        # All that ASHA wants to know of a trial.
        self._known: dict[int, Any] = {}

    def goes_on(self, number: int, rung: int, value: float) -> bool:
        """Decide on a trial after a rung, by what was decided on before; higher values are better."""
        if number not in self._known:
            self._known[number] = SimpleNamespace(trial_id=str(number))
            self._asha.on_trial_add(None, self._known[number])  # type: ignore[arg-type]
        result = {"resource": self._factor**rung, "value": value}
        return self._asha.on_trial_result(None, self._known[number], result) == TrialScheduler.CONTINUE  # type: ignore[arg-type]


class Jobs(Protocol):
    """What Tune is to run.

    Attributes:
        most_jobs: no more are ever handed out.
    """

    most_jobs: int

    def hand_out(self) -> dict[str, Any] | None:
        """The next job, of which ``key`` names it; None while that depends on results that are not there yet."""
        ...

    @property
    def finished(self) -> bool:
        """Whether no job will ever come any more."""
        ...

    def take(self, key: Hashable, result: dict[str, Any] | None) -> None:
        """A job's result; None: it raised, or its process died, again and again."""
        ...


class _Source(Searcher):
    """Hands the jobs to Tune."""

    def __init__(self, jobs: Jobs):
        super().__init__(metric="value", mode="max")
        self._jobs = jobs
        self._out: dict[str, Hashable] = {}

    def suggest(self, trial_id: str) -> Any:
        job = self._jobs.hand_out()
        if job is None:
            return Searcher.FINISHED if self._jobs.finished else None
        self._out[trial_id] = job["key"]
        return job

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a job has one result, its last."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._jobs.take(self._out.pop(trial_id), None if error else result)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is started again finds what its jobs have left (ADR 3)."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a copy of its settings with every experiment; nobody reads it.
        return {}


def run_tune(
    work: Work,
    jobs: Jobs,
    folder: str,
    cpus: float,
    gpus: float,
    at_once: int,
    callbacks: Sequence[tune.Callback] = (),
) -> None:
    """Run all jobs in the running session, each in a process of its own on what Tune reserves for it.

    Tune's own records, with TensorBoard's, are under ``folder/tune``.

    Args:
        work: makes a job's result, numbers and strings, ``value`` among them. Where it raises, the job is run again.
        jobs: what to run.
        folder: local or ``s3://``.
        cpus: of a job.
        gpus: of a job.
        at_once: jobs that may wait for room at the same time.
        callbacks: told of every job, beside those that write Tune's records.

    Raises:
        RunError: Tune gave up, or was stopped.
    """
    # Ctrl-C is the command's own; Tune's handler would wait for jobs that run for hours.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # Its boxes would stand among the progress, whatever ``verbose`` says.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # It would ask an autoscaler for the place of one job at a time.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(at_once)

    def job(config: dict[str, Any]) -> None:
        try:
            result = work(config)
        except Exception:
            # Tune writes it into its records.
            raise RuntimeError(redact(traceback.format_exc())) from None
        tune.report(result)

    # Of an earlier start; what its jobs made is elsewhere and is found.
    storage.remove(storage.join(folder, EXPERIMENT))
    where, files = _storage(folder)
    share = PlacementGroupFactory([{"CPU": cpus} | ({"GPU": gpus} if gpus else {})])
    tuner = tune.Tuner(
        tune.with_resources(job, share),
        tune_config=tune.TuneConfig(
            search_alg=_Source(jobs),
            num_samples=jobs.most_jobs,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=EXPERIMENT,
            storage_path=where,
            storage_filesystem=files,
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
            verbose=0,
            callbacks=list(callbacks),
        ),
    )
    go_on = "what was measured is kept, run the same command again to go on"
    try:
        tuner.fit()
    except Exception as error:
        raise RunError(f"search: Ray Tune gave up ({first_line(error)}); {go_on}") from error
    # A signal that Tune takes for its own ends it as if all were done.
    if not jobs.finished:
        raise RunError(f"search: Ray Tune was stopped before all trials were done; {go_on}")


def _name(trial: Any) -> str:
    return str(trial.config["key"])


def _storage(folder: str) -> tuple[str, Any]:
    """Path and file system for Tune, which speaks pyarrow's."""
    if storage.is_local(folder):
        return storage.absolute(folder), None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = storage.resolve(folder)
    return path, PyFileSystem(FSSpecHandler(fs))


def run_here(work: Work, jobs: Jobs) -> None:
    """The same in this process, one job after the other: for debugging and tests."""
    while not jobs.finished:
        job = jobs.hand_out()
        assert job is not None, "no other is out"
        try:
            result = Retrying(stop=stop_after_attempt(RESTARTS + 1), reraise=True)(work, job)
        except Exception as error:
            result = {"reason": redact(f"{type(error).__name__}: {first_line(error)}")}
        jobs.take(job["key"], result)
