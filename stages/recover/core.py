"""Optimising the pixels of one unit. Plain torch: usable in a debugger, a notebook or a trial."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cluster.errors import RunError
from cluster.rng import generator
from stages.data import DataSpec
from stages.device import reproducible
from stages.recover.augment import augment, draw_augmentation
from stages.recover.objective import LocalObjective, Objective
from stages.recover.options import RecoverOptions
from stages.recover.selection import step_teachers
from stages.recover.state import RecoveryState
from stages.recover.unit import RecoverUnit

if TYPE_CHECKING:
    from stages.teachers.teacher import Teacher

ADAM_EPS = 1e-8
# Losses are read from the device only so often, because reading makes a GPU wait.
LOG_EVERY = 50


@dataclass(frozen=True)
class RecoveredUnit:
    """What a unit gives.

    Attributes:
        pixels: uint8 [n, C, S, S] on the CPU, the last iterate.
        loss_ce: cross-entropy of the last step, before its update.
        loss_bn: teacher → its L_BN at the last step that used it; teachers that no step drew are absent.
        iterations: steps made.
        log: losses every ``LOG_EVERY`` steps and at the last: ``step``, ``loss``, ``ce``, ``bn`` (by teacher).
    """

    pixels: Tensor
    loss_ce: float
    loss_bn: dict[str, float]
    iterations: int
    log: list[dict[str, Any]]


def learning_rate(step: int, iterations: int, base: float) -> float:
    """Cosine from ``base`` to 0 without warm-up: ½(1 + cos(πt/T)) · base."""
    return 0.5 * (1 + math.cos(math.pi * step / iterations)) * base


def initial_noise(unit: RecoverUnit, data: DataSpec) -> Tensor:
    """N(0, 1) in normalised space (SRe2L), float32 [n, C, S, S]."""
    shape = (len(unit.classes), data.channels, data.image_size, data.image_size)
    return torch.from_numpy(generator(unit.seed, "noise").standard_normal(shape, dtype="float32"))


def recover_unit(
    unit: RecoverUnit,
    images: Tensor | None,
    teachers: Mapping[str, Teacher] | Objective,
    options: RecoverOptions,
    data: DataSpec,
    device: torch.device | str,
    on_step: Callable[[int, int], None] | None = None,
    state: RecoveryState | None = None,
    on_state: Callable[[int, Callable[[], RecoveryState]], None] | None = None,
) -> RecoveredUnit:
    """Optimise the images of a unit with Adam, clamping to the valid range after every step.

    Args:
        unit: what to optimise and against whom.
        images: initial images, normalised float32 [n, C, S, S]; None: noise.
        teachers: at least those the unit names, on ``device``; or an objective that knows them.
        options: the objective and its optimiser; ``unit.iterations`` is the number of steps.
        data: the normalised space.
        device: where to compute.
        on_step: called after every step with (steps done, steps).
        state: of this very unit and these settings, to go on from; the result is the same to the last bit.
        on_state: called after every step but the last with (steps done, what gives the state for as long as the next
            step has not ended). What it raises ends the unit.

    Raises:
        RunError: the loss or a pixel is not finite; names unit, seed and step.
        UserError: a BN teacher cannot be matched.
    """
    start = initial_noise(unit, data) if images is None else images
    x = start.to(device, torch.float32)
    low, high = data.valid_range(x)
    # As published, noise is not clamped before the first step.
    x = x.detach().clone().requires_grad_()
    y = torch.tensor(unit.classes, device=x.device)
    objective = LocalObjective(teachers, options) if isinstance(teachers, Mapping) else teachers
    objective.prepare(unit.logit_teachers, unit.bn_teachers, x.detach()[:1])
    optimizer = torch.optim.Adam([x], lr=options.lr, betas=options.betas, eps=ADAM_EPS)
    first_bad = torch.full((), unit.iterations, device=x.device)
    last_bn: dict[str, Tensor] = {}
    log: list[dict[str, Any]] = []
    begin = 0
    if state is not None:
        begin, log = state.step, list(state.log)
        first_bad = first_bad.fill_(state.first_bad)
        last_bn = {name: value.to(x.device) for name, value in state.last_bn.items()}
        with torch.no_grad():
            x.copy_(state.pixels)
        averages = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        # Adam keeps its count of steps on the CPU, as a float.
        optimizer.state[x] = {"step": torch.tensor(float(begin))} | {
            name: torch.empty_like(x, requires_grad=False).copy_(value) for name, value in averages.items()
        }

    def snapshot(done: int) -> RecoveryState:
        adam = optimizer.state[x]
        return RecoveryState(
            done, x.detach(), adam["exp_avg"], adam["exp_avg_sq"], int(first_bad), dict(last_bn), list(log)
        )

    with reproducible(options.precision):
        for step in range(begin, unit.iterations):
            logit_names, bn_names = step_teachers(unit, options, step)
            drawn = draw_augmentation(unit.seed, step, len(x), data.image_size, options)
            augmented = augment(x, drawn)
            found = objective.step(augmented.detach(), y, logit_names, bn_names)
            (x.grad,) = torch.autograd.grad(augmented, [x], found.gradient)
            optimizer.param_groups[0]["lr"] = learning_rate(step, unit.iterations, options.lr)
            optimizer.step()
            with torch.no_grad():
                x.clamp_(low, high)
                first_bad = torch.where(
                    found.loss.isfinite() & x.isfinite().all(), first_bad, first_bad.clamp_max(step)
                )
                last_bn |= found.l_bn
            if step % LOG_EVERY == 0 or step == unit.iterations - 1:
                _check_finite(unit, int(first_bad))
                bn = {name: value.item() for name, value in found.l_bn.items()}
                log.append({"step": step, "loss": found.loss.item(), "ce": found.ce.item(), "bn": bn})
            if on_step:
                on_step(step + 1, unit.iterations)
            if on_state and step + 1 < unit.iterations:
                on_state(step + 1, functools.partial(snapshot, step + 1))
    return RecoveredUnit(
        pixels=data.denormalise(x.detach()).cpu(),
        loss_ce=log[-1]["ce"],
        loss_bn={name: last_bn[name].item() for name in unit.bn_teachers if name in last_bn},
        iterations=unit.iterations,
        log=log,
    )


def _check_finite(unit: RecoverUnit, first_bad: int) -> None:
    if first_bad < unit.iterations:
        raise RunError(
            f"unit {unit.id} (seed {unit.seed}): the loss is not finite at step {first_bad} of {unit.iterations}; "
            "lower recover.lr or recover.r_bn, or check the teachers and initial images it uses"
        )
