"""A step of recovery to be timed, in the published way and in ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cluster.errors import UserError
from stages.data import DataSpec
from stages.device import reuse_memory
from stages.recover.compiler import prepare_compiler
from stages.recover.core import recover_unit
from stages.recover.objective import LocalObjective
from stages.recover.options import RecoverOptions
from stages.recover.reference import ReferenceStep
from stages.recover.selection import step_teachers
from stages.recover.speed import timed
from stages.recover.unit import RecoverUnit
from stages.teachers.build import build_network, memory_format
from stages.teachers.options import TeacherSpec
from stages.teachers.teacher import Teacher

TURN_S = 2.0
MAX_STEPS = 200
# Steps in which every set of teachers comes up about as often as it should.
MANY = 40


def steps_of_turn(seconds: float, least: int = 1) -> int:
    """Steps that take about ``TURN_S``, a multiple of ``least``; one of them takes ``seconds``."""
    return least * max(1, round(min(MAX_STEPS, TURN_S / seconds) / least))


class TimedStep:
    """A unit's steps in both ways, with fresh weights and noise for images: neither changes the speed.

    Args:
        unit: what to optimise.
        specs: of the teachers; their weights are not read.
        data: of the images.
        options: of recovery.
        device: where.

    Raises:
        UserError: a teacher cannot be built, or has fewer outputs than there are classes.
    """

    def __init__(
        self,
        unit: RecoverUnit,
        specs: Mapping[str, TeacherSpec],
        data: DataSpec,
        options: RecoverOptions,
        device: torch.device,
    ):
        self.unit, self.data, self.options, self.device = unit, data, options, device
        if options.compile:
            prepare_compiler(device)
        self.set_memory(True)
        self.x = torch.randn(len(unit.classes), data.channels, data.image_size, data.image_size, device=device)
        used = dict.fromkeys([*unit.logit_teachers, *unit.bn_teachers])
        teachers = {name: self._teacher(name, specs[name]) for name in used}
        # The published way has one set for good: that of the first step.
        logit, matched = step_teachers(unit, options, 0)
        self._published = ReferenceStep(teachers, logit[0], matched, options.r_bn)
        for teacher in teachers.values():
            teacher.to(memory_format=memory_format(teacher.network))  # type: ignore[call-overload]
        self._objective = LocalObjective(teachers, options)

    def _teacher(self, name: str, spec: TeacherSpec) -> Teacher:
        classes = self.data.num_classes
        outputs = spec.num_outputs or classes
        if outputs < classes:
            raise UserError(f"teachers.{name}.num_outputs: {outputs} is less than the data's {classes} classes")
        network = build_network(spec, outputs, self.data.channels)
        return Teacher(
            name, network, self.data, num_outputs=outputs, outputs=range(classes), mean=spec.mean, std=spec.std,
            input_size=spec.input_size, resize=spec.resize,
        ).to(self.device)  # fmt: skip

    def used(self, index: int) -> set[str]:
        """Teachers of a step."""
        logit, matched = step_teachers(self.unit, self.options, index)
        return {*logit, *matched}

    def ours(self, steps: int) -> Tensor:
        """Some steps as recovery makes them."""
        unit = self.unit.model_copy(update={"iterations": steps})
        return recover_unit(unit, self.x, self._objective, self.options, self.data, self.device).pixels

    def turn(self) -> int:
        """Steps of ours to be timed together; where every step has a set of its own, they are many, and now warm."""
        least = MANY if self.options.selection in ("per_step", "round_robin") else 1
        return steps_of_turn(timed(lambda: self.ours(least)) / least, least)

    def warm(self) -> None:
        """Have the memory of a worker that is at work."""
        self.set_memory(True)
        self.ours(1)

    def published(self, steps: int) -> Tensor:
        """As many the published way, in float32 without TF32."""
        y = torch.tensor(self.unit.classes, device=self.device)
        low, high = self.data.valid_range(self.x)
        return self._published.optimise(self.x, y, steps, self.options.lr, low, high, self.options.roll)

    def set_memory(self, reuse: bool) -> None:
        """As a worker has it, or as a process has it by default."""
        if self.device.type == "cpu":
            reuse_memory(reuse)
