"""Where the teachers of a unit live: with the pixels, or each in an actor of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster import preemption
from cluster.resources import ActorResources
from stages.data import DataSpec
from stages.device import pick_device, reuse_memory
from stages.recover.compiler import prepare_compiler
from stages.recover.options import RecoverOptions
from stages.recover.split import HereLink, Part, SplitObjective, TeacherPart
from stages.teachers.options import TeacherSpec
from stages.teachers.teacher import load_teacher

# An actor whose teachers are elsewhere waits for them most of the time.
UNIT_CPUS = 0.1


def prepare_process(device: torch.device, options: RecoverOptions) -> None:
    """What a process that will hold teachers does first.

    Raises:
        RunError: see ``prepare_compiler``.
    """
    if options.compile:
        prepare_compiler(device)
    if device.type == "cpu":
        reuse_memory()


def make_part(name: str, spec: TeacherSpec, data: DataSpec, options: RecoverOptions, gpu: bool) -> TeacherPart:
    """One teacher's part of the objective, in the process that will hold it."""
    device = pick_device(gpu)
    prepare_process(device, options)
    return TeacherPart(name, load_teacher(name, spec, data, device), options, device)


def unit_resources(resources: ActorResources) -> ActorResources:
    """Of the actor that holds a unit's pixels, with ``per_teacher``; without a number of actors there is one."""
    return ActorResources(cpus=UNIT_CPUS, gpus=0, actors=resources.actors or 1, threads=resources.threads)


def teacher_resources(resources: ActorResources, teachers: int) -> ActorResources:
    """Of the teachers' actors of all units at the same time, with ``per_teacher``."""
    low, high = resources.pool or (1, 1)
    return resources.model_copy(update={"actors": (low * teachers, high * teachers)})


def helper_share(resources: ActorResources, teachers: int, cpus: float, gpus: float) -> tuple[float, float]:
    """(CPUs, GPUs) of one teacher's actor on a cluster with so many.

    A GPU of its own where there are any. Else a share of the CPUs such that all of them leave some to the units' actors
    and to Ray.
    """
    device = resources.gpus if resources.gpus is not None else float(gpus > 0)
    if resources.cpus is not None or device:
        return resources.cpus or 0.0, device
    _, high = resources.pool or (1, 1)
    share = 0.8 * cpus / (high * teachers)
    return max(0.001, math.floor(1000 * min(float(resources.threads), share)) / 1000), 0.0


def split_objective(
    specs: Mapping[str, TeacherSpec], data: DataSpec, options: RecoverOptions, resources: ActorResources
) -> SplitObjective:
    """The objective over teachers that live by themselves: in actors of this one, without Ray in this process.

    Raises:
        PrismError: a teacher does not load.
        HelperLost: an actor died meanwhile.
    """
    gpu = resources.gpus != 0
    makers: dict[str, dict[str, Any]] = {
        name: {"name": name, "spec": spec, "data": data, "options": options, "gpu": gpu} for name, spec in specs.items()
    }
    if not preemption.is_worker():
        return SplitObjective({name: HereLink(make_part(**kwargs)) for name, kwargs in makers.items()}, options)
    from cluster.capacity import read_capacity
    from cluster.helpers import Helpers

    size = read_capacity()
    cpus, gpus = helper_share(resources, len(specs), size.cpus, size.gpus)
    helpers = Helpers({name: (make_part, kwargs) for name, kwargs in makers.items()}, cpus, gpus, resources.threads)
    return SplitObjective({name: ActorLink(helpers, name) for name in specs}, options)


class ActorLink:
    """The way to a part in an actor."""

    def __init__(self, helpers: Any, name: str):
        self._helpers, self._name = helpers, name

    def layers(self, example: NDArray[np.float32]) -> Callable[[], int]:
        """See ``PartLink``."""
        return self._helpers.call(self._name, "layers", example)  # type: ignore[no-any-return]

    def measure(
        self, batch: NDArray[np.float32], labels: NDArray[np.int64], ce_weight: float | None, bn_weight: float | None
    ) -> Callable[[], Part]:
        """See ``PartLink``."""
        return self._helpers.call(self._name, "measure", batch, labels, ce_weight, bn_weight)  # type: ignore[no-any-return]
