"""The configuration of a run: one typed tree, checked before anything starts."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.resources import ActorResources, Frozen, SessionOptions, TrainResources
from pipeline.search.options import SearchOptions
from stages.evaluate.options import EvaluateOptions
from stages.recover.options import Placement, RecoverOptions, leave_out_unsaid
from stages.relabel.options import RelabelOptions
from stages.squeeze.options import SqueezeOptions
from stages.teachers.arch import portable_arch
from stages.teachers.options import TeacherSpec

# A run directory belongs to what determines its artifacts. These do not: where it lies, what it is called, the
# machines it ran on, and lists that may grow because each entry has a result file of its own.
NOT_IDENTITY = [
    ("name",),
    ("out",),
    ("resources",),
    # Each trial is identified by its own configuration.
    ("search",),
    ("provenance",),
    ("data", "train"),
    ("data", "val"),
    ("squeeze", "cache"),
    ("recover", "checkpoint_every"),
    ("evaluate", "students"),
    ("evaluate", "seeds"),
    ("evaluate", "baselines"),
    ("evaluate", "draws"),
    # Students carry their own content hash and the protocol's name.
    ("evaluate", "protocol"),
]


class DataConfig(Frozen):
    """The real data.

    Attributes:
        train, val: folders of image shards, as written by ``prism import``; local or ``s3://``.
        image_size: side in pixels at which images are distilled; real images are resized (shorter side) and
            centre-cropped to it.
        resize: length of that shorter side; None: ``image_size``. ImageNet's usual pair is 256 and 224.
        channels: 3 = RGB, 1 = grey.
        mean, std: per channel for pixels in [0, 1]. None: measured at import.
        num_classes: needed to plan without data only; checked against the data otherwise.
        class_names: expected class order; checked against the data. None: the data's.
    """

    train: str | None = None
    val: str | None = None
    image_size: int = Field(ge=8)
    resize: int | None = None
    channels: Literal[1, 3] = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    num_classes: int | None = Field(default=None, ge=2)
    class_names: list[str] | None = None

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(f"resize = {self.resize} is smaller than image_size = {self.image_size}; raise it")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values, but channels = {self.channels}; give one for each")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self


class ResourcesConfig(Frozen):
    """Where and on how much the stages run.

    Changing it never changes results, except ``placement``, the ``workers`` of a training and ``threads``, which for
    trainings come from the CPUs, ``gpus``, ``parallel`` and the number of networks where they are left open.

    Attributes:
        placement: of the teachers of recovery. ``colocated`` = all in the unit's actor, on one device; ``per_teacher``
            = each in an actor of its own, for pools that do not fit one device. Then ``recover`` describes the actor
            of one teacher, by default with a GPU of its own, and its ``actors`` the units at the same time, by
            default 1. The images of both agree up to the rounding of float sums.
        probe: find out at each start of recovery, on the first GPU that comes, whether 1, 2 or 4 units at the same time
            are fastest, and share all GPUs so. Takes minutes, and changes no result. Not with ``cpus``, ``gpus`` or
            ``actors`` of ``recover``, which it decides; of no effect without GPUs, with ``--serial``, in a search, and
            where there are fewer than two units, or too little memory for two workers, a GPU.
    """

    session: SessionOptions = SessionOptions()
    squeeze: TrainResources = TrainResources()
    placement: Placement = "colocated"
    probe: bool = False
    recover: ActorResources = ActorResources()
    relabel: ActorResources = ActorResources()
    evaluate: TrainResources = TrainResources()
    validate_: ActorResources = Field(default=ActorResources(), alias="validate")

    @model_validator(mode="after")
    def _check(self) -> ResourcesConfig:
        given = [name for name in ("cpus", "gpus", "actors") if getattr(self.recover, name) is not None]
        against = [f"recover.{name}" for name in given] + ["placement"] * (self.placement != "colocated")
        if self.probe and against:
            raise ValueError(f"probe does not go with {' and '.join(against)}; leave one or the other out")
        return self


class Config(Frozen):
    """A whole run.

    Attributes:
        name: shown in the report.
        recipe: defaults to start from (``pipeline/recipes``); also the method's name in results.
        seed: of every random choice of the run.
        out: run directory, a local path or ``s3://``.
        search: what a search varies, and how; other commands leave it alone.
        provenance: written to ``run.yaml`` (versions, data fingerprint); ignored when read.
    """

    name: str = "run"
    recipe: str = "prism"
    seed: int = Field(default=0, ge=0)
    out: str
    data: DataConfig
    teachers: dict[str, TeacherSpec]
    squeeze: SqueezeOptions = SqueezeOptions()
    recover: RecoverOptions = RecoverOptions()
    relabel: RelabelOptions = RelabelOptions()
    evaluate: EvaluateOptions = EvaluateOptions()
    resources: ResourcesConfig = ResourcesConfig()
    search: SearchOptions | None = None
    provenance: dict[str, Any] = Field(default={})

    @field_validator("teachers")
    @classmethod
    def _teacher_names(cls, value: dict[str, TeacherSpec]) -> dict[str, TeacherSpec]:
        if not value:
            raise ValueError(
                "no teacher is defined; name at least one, e.g. teachers: {resnet18: {arch: builtin:resnet18}}"
            )
        for name in value:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(
                    f"teacher name {name!r} must be letters, digits, '-', '_' and '.', since it names a folder"
                )
        return value

    @model_validator(mode="after")
    def _references(self) -> Config:
        known = ", ".join(self.teachers)
        for field, names in (
            ("recover.logit_teachers", self.recover.logit_teachers),
            ("recover.bn_teachers", self.recover.bn_teachers),
            ("relabel.teachers", self.relabel.teachers),
        ):
            if not names:
                raise ValueError(f"{field} is empty; name at least one of: {known}")
            if len(set(names)) != len(names):
                raise ValueError(f"{field} names a teacher twice; remove the second")
            for name in names:
                if name not in self.teachers:
                    raise ValueError(f"{field} names {name!r}, which is not under teachers; defined: {known}")
        recover = self.recover
        if recover.selection == "round_robin":
            if recover.logit_teachers != recover.bn_teachers:
                raise ValueError(
                    "recover.logit_teachers must equal recover.bn_teachers with selection: round_robin, "
                    "where one network a step gives both losses"
                )
        elif len(recover.logit_teachers) != 1:
            raise ValueError(
                f"recover.logit_teachers has {len(recover.logit_teachers)} names; selection: {recover.selection} "
                "has one primary teacher"
            )
        for name in self.relabel.priors:
            if name not in self.relabel.teachers:
                raise ValueError(f"relabel.priors names {name!r}, which is not in relabel.teachers; remove it")
        if self.relabel.ensemble == "prior_softmax":
            lacking = [n for n in self.relabel.teachers if n not in self.relabel.priors]
            if lacking:
                raise ValueError(f"relabel.priors lacks {', '.join(lacking)}, which ensemble: prior_softmax needs")
        if len(set(self.evaluate.seeds)) != len(self.evaluate.seeds):
            raise ValueError("evaluate.seeds names a seed twice; remove the second")
        return self

    def identity(self) -> dict[str, Any]:
        """What determines the artifacts of a run directory, as plain values."""
        value = self.model_dump(mode="json", by_alias=True)
        for *parents, leaf in NOT_IDENTITY:
            node = value
            for parent in parents:
                node = node[parent]
            node.pop(leaf)
        for spec in value["teachers"].values():
            # Files may be moved or mounted elsewhere; what they are called stays part of what was asked for.
            spec["weights"] = spec["weights"] and spec["weights"].rpartition("/")[2]
            spec["arch"] = portable_arch(spec["arch"])
        leave_out_unsaid(value["relabel"])
        return value

    def evaluation(self) -> dict[str, Any]:
        """``evaluate`` as plain values, as ``identity`` has the rest: a user's file may be moved."""
        value = self.evaluate.model_dump(mode="json")
        for network in value["students"].values():
            network["arch"] = portable_arch(network["arch"])
        leave_out_unsaid(value["protocol"])
        return value

    def sha256(self) -> str:
        """Hash of ``identity``."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
