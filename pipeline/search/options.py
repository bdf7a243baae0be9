"""The ``search`` section: what is varied, how cheaply it is measured, and for how long."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.resources import Frozen

KINDS = ("subset", "choice", "log", "uniform", "integer")


class Dimension(Frozen):
    """Values that one field of the configuration may take; exactly one of the five kinds.

    Attributes:
        subset: for a list of teachers: any non-empty subset of these. ``all`` = all teachers, in
            ``recover.bn_teachers`` those with BatchNorm.
        choice: one of these; for a list of teachers, one teacher or a list of them; for a section, fields of it.
        log, uniform: a number between two bounds, log-uniform or uniform.
        integer: a whole number between two bounds, both included.
        when: field → values; suggested only where that field, searched or not, has one of them, else left as it is.
    """

    subset: list[str] | Literal["all"] | None = None
    choice: list[Any] | None = None
    log: tuple[float, float] | None = None
    uniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = None
    when: dict[str, list[Any]] = {}

    @field_validator("subset", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        # Of a union, each branch would be complained of.
        if value in (None, "all") or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return value
        raise ValueError(f"{value!r} is given, but it must be a list of teachers or all")

    @model_validator(mode="after")
    def _check(self) -> Dimension:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'nothing'} is given; give one of {', '.join(KINDS)}")
        bounds = self.bounds
        if bounds and bounds[0] >= bounds[1]:
            raise ValueError(f"{given[0]}: [{bounds[0]:g}, {bounds[1]:g}] is empty; the first bound is the smaller one")
        if self.log and self.log[0] <= 0:
            raise ValueError(f"log: {self.log[0]:g} has no logarithm; both bounds must be positive")
        values = self.subset if isinstance(self.subset, list) else self.choice
        if values is not None and (not values or any(values.count(value) > 1 for value in values)):
            raise ValueError(f"{given[0]} is empty or names a value twice; give different ones")
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Of a number; None where it is none."""
        return self.log or self.uniform or self.integer

    @property
    def kind(self) -> str:
        """Which of ``KINDS`` it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


class SplitOptions(Frozen):
    """Images cut from the training data, on which trials are measured.

    Attributes:
        per_class: images of each class; drawn by the run's seed.
    """

    per_class: int = Field(default=50, ge=1)


class SearchOptions(Frozen):
    """How a search goes.

    Attributes:
        trials: points that are tried; the first is the configuration itself.
        space: field of ``recover``, ``relabel`` or ``evaluate.protocol``, by its path, → values it may take.
        rungs: overrides of fields that are not searched, by path, from the cheapest measurement to the dearest. A
            trial that does worse than most at a rung is not measured at the next. ``classes`` beside them measures on
            so many of the data's classes, drawn by the run's seed, of which a later rung has at least as many.
        reduction_factor: one in so many goes on from a rung to the next.
        sampler: ``tpe`` = Optuna's, with NSGA-II for two objectives; ``random``.
        objectives: ``top1_last`` alone, or with ``gpu_seconds`` (planned); then trials are measured at the last rung
            only.
        seeds: of the students of a trial.
        split: of the training data.
        trackers: experiment trackers that show the jobs beside TensorBoard's records: ``mlflow``, ``wandb``,
            which have to be installed; they hear of the jobs that Tune runs, of none with ``--serial``.
        parallel: jobs at a time on the virtual clock that orders results. None: as many as the cluster holds when the
            search starts. Part of what makes the table come out the same.
        cpus: CPUs of a job; torch threads are as many, at least one.
        gpus: GPUs of a job. None: 1 where the cluster has GPUs, else 0; with ``--serial`` 0.
        min_succeeded: share of trials that must not fail.
        final_seeds: students of the default's and the winner's full runs, which are tested on the validation data.
    """

    trials: int = Field(default=24, ge=1)
    space: dict[str, Dimension]
    rungs: list[dict[str, Any]] = Field(default=[{}], min_length=1)
    reduction_factor: float = Field(default=3.0, gt=1)
    sampler: Literal["tpe", "random"] = "tpe"
    objectives: list[Literal["top1_last", "gpu_seconds"]] = ["top1_last"]
    seeds: list[int] = [0]
    split: SplitOptions = SplitOptions()
    trackers: list[Literal["mlflow", "wandb"]] = []
    parallel: int | None = Field(default=None, ge=1)
    cpus: float = Field(default=1.0, gt=0)
    gpus: float | None = Field(default=None, ge=0)
    min_succeeded: float = Field(default=0.5, gt=0, le=1)
    final_seeds: list[int] = [0, 1, 2]

    @model_validator(mode="after")
    def _check(self) -> SearchOptions:
        if not self.space:
            raise ValueError("space is empty; name at least one field, e.g. recover.r_bn: {log: [0.1, 100]}")
        if self.objectives not in (["top1_last"], ["top1_last", "gpu_seconds"]):
            raise ValueError("objectives must be [top1_last] or [top1_last, gpu_seconds]")
        for name in ("seeds", "final_seeds"):
            seeds = getattr(self, name)
            if not seeds or len(set(seeds)) != len(seeds):
                raise ValueError(f"{name} is empty or names a seed twice; give different ones")
        return self
