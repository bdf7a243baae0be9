"""Paths of a configuration that mean the same in every worker."""

from __future__ import annotations

from typing import TypeVar

from cluster import storage
from pipeline.config import Config
from stages.teachers.arch import absolute_arch
from stages.teachers.options import PRETRAINED, NetworkSpec, TeacherSpec

Spec = TypeVar("Spec", bound=NetworkSpec)


def absolute(config: Config) -> Config:
    """The same configuration with paths that do not depend on the working directory."""

    def full(uri: str | None) -> str | None:
        return uri and storage.absolute(uri)

    def network(spec: Spec) -> Spec:
        return spec.model_copy(update={"arch": absolute_arch(spec.arch)})

    def teacher(spec: TeacherSpec) -> TeacherSpec:
        weights = spec.weights if spec.weights == PRETRAINED else full(spec.weights)
        return network(spec).model_copy(update={"weights": weights})

    data = config.data.model_copy(update={"train": full(config.data.train), "val": full(config.data.val)})
    students = {name: network(spec) for name, spec in config.evaluate.students.items()}
    return config.model_copy(
        update={
            "out": full(config.out),
            "data": data,
            "teachers": {name: teacher(spec) for name, spec in config.teachers.items()},
            "squeeze": config.squeeze.model_copy(update={"cache": full(config.squeeze.cache)}),
            "evaluate": config.evaluate.model_copy(update={"students": students}),
        }
    )
