"""The recovery objective: cross-entropy of the logit teachers plus BatchNorm-statistics matching.

For BN layer l with running mean m and variance v, and for its INPUT in the current batch the mean μ and biased
variance s over (batch, H, W), all vectors over channels:

    r_l = ‖m − μ‖₂ + var_weight · ‖v − s‖₂        L_BN = a · r_1 + Σ_{l≥2} r_l
    L = mean over logit teachers of CE + r_bn · (1/|B|) · Σ_{z∈B} L_BN(z)

(SRe2L; the set mean is PRISM's.) Norms are plain: neither squared nor divided by the number of channels, so that a
network's L_BN grows with its width C_l and depth. ``recover.bn_norm`` takes that out: ``per_layer`` has r_l / √C_l in
place of r_l, ``per_teacher`` has L_BN / (a · √C_1 + Σ_{l≥2} √C_l) in place of L_BN.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import RunError, UserError
from stages.device import autocast
from stages.recover.compiled import CompiledTeacher, compiling
from stages.recover.frozen import widen_depthwise_gradients
from stages.recover.options import RecoverOptions

if TYPE_CHECKING:
    from stages.teachers.teacher import Teacher


class _LayerDistance(torch.autograd.Function):
    """r_l of one layer, with its gradient in one pass over the activations.

    ∂r/∂x = (1/n) · [(μ − m)/‖μ − m‖ + var_weight · 2(x − μ)(s − v)/‖s − v‖], and 0 for a norm that is 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, var_weight: float) -> Tensor:
        """Statistics in float32 at least, whatever the activations are."""
        n = x.numel() // x.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Both sums in one pass, of distances from the mean of some eight of the images: these are of this batch, so the
        # square of how far they are from its mean is at most about eight times the variance, and the difference below
        # keeps its digits. Not torch.var_mean, which takes about ten times as long on CPUs.
        near = wide[:: max(1, len(wide) // 8)].mean((0, 2, 3), keepdim=True)
        apart = wide - near
        rest = apart.mean((0, 2, 3))
        batch_mean = near.flatten() + rest
        batch_var = (apart.square_().mean((0, 2, 3)) - rest.square()).clamp_min(0)
        to_mean, to_var = batch_mean - mean, batch_var - var
        mean_norm, var_norm = torch.linalg.vector_norm(to_mean), torch.linalg.vector_norm(to_var)
        tiny = torch.finfo(wide.dtype).tiny
        slope = (to_var / var_norm.clamp_min(tiny)) * (2 * var_weight / n)
        offset = to_mean / mean_norm.clamp_min(tiny) / n - slope * batch_mean
        ctx.save_for_backward(x, slope, offset)
        return mean_norm + var_weight * var_norm

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        x, slope, offset = ctx.saved_tensors
        column = (1, -1, 1, 1)
        gradient = torch.addcmul((offset * grad).view(column), x, (slope * grad).view(column))
        return gradient.to(x.dtype), None, None, None


def layer_distance(layer: nn.BatchNorm2d, x: Tensor, var_weight: float) -> Tensor:
    """r_l for the input ``x`` of a layer."""
    distance: Tensor = _LayerDistance.apply(x, layer.running_mean, layer.running_var, var_weight)
    return distance


def _weighing(var_weight: float) -> Callable[[nn.BatchNorm2d, Tensor], Tensor]:
    """``layer_distance`` alone: what compiled code refers to is kept with it."""

    def distance(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return layer_distance(layer, x, var_weight)

    return distance


class _AllSeen(Exception):
    """Every BN input has been measured; the rest of the network has nothing to add."""


class BNTap:
    """Measures L_BN of one teacher during its forward pass.

    A layer that the network never runs in evaluation mode (an auxiliary head) is left out, and ``first`` is the
    first in ``modules()`` order of those that run. A layer that runs twice is refused: its running statistics mix
    both inputs, so neither has a target. Hooks live only as long as a forward pass.

    Args:
        name: for messages.
        teacher: frozen, in evaluation mode.
        example: images to find out, once, which layers run: [≥1, C, S, S] normalised.
        options: weights of the terms, precision, and whether to compile.

    Raises:
        UserError: a BN layer runs twice in one forward pass.
    """

    def __init__(self, name: str, teacher: Teacher, example: Tensor, options: RecoverOptions):
        self.name, self.teacher = name, teacher
        self._first, self._var_weight = options.first_bn_multiplier, options.var_weight
        self._precision, self._compile, self._example = options.precision, options.compile, example[:1].detach()
        self._compiled: dict[tuple[bool, bool], CompiledTeacher] = {}
        if self._precision == "bf16" and example.device.type == "cpu":
            widen_depthwise_gradients(teacher)
        runs: dict[nn.Module, int] = {layer: 0 for layer in teacher.bn_layers}

        def count(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            runs[layer] += 1

        if runs:
            with contextlib.ExitStack() as hooks, torch.no_grad():
                for layer in runs:
                    hooks.enter_context(layer.register_forward_pre_hook(count))
                teacher(example)
        if max(runs.values(), default=0) > 1:
            raise UserError(
                f"teachers.{name}: a BatchNorm layer runs more than once in a forward pass, so its statistics have no "
                "single input to match; use a network that gives every use a layer of its own"
            )
        self.layers = [layer for layer in teacher.bn_layers if runs[layer]]
        roots = [math.sqrt(layer.num_features) for layer in self.layers]
        # Of every layer's distance, and of their sum; None: nothing is divided.
        self._of_layers = example.new_tensor(roots) if options.bn_norm == "per_layer" else None
        whole = sum(roots) + (self._first - 1) * roots[0] if roots else 0.0
        # 0 where the only layer has no weight.
        self._of_all = whole if options.bn_norm == "per_teacher" and whole else None

    def __call__(self, x: Tensor, logits: bool, statistics: bool = True) -> tuple[Tensor | None, Tensor]:
        """One forward pass.

        Args:
            x: normalised float [B, C, S, S].
            logits: run to the end; else stop at the input of the BN layer that runs last.
            statistics: measure L_BN.

        Returns:
            Logits [B, classes] (None where not wanted) and L_BN, a scalar (0 without BN layers, or where not wanted);
            float32, or float64 for a teacher of float64.

        Raises:
            RunError: the pass skipped a BN layer.
            UserError, TransientError: ``compile`` is on, and the teacher cannot be compiled.
        """
        statistics = statistics and bool(self.layers)
        out, terms = None, None
        if logits or statistics:
            forward = self._compiled_forward if self._compile else self._forward
            with compiling(), autocast(x.device, self._precision):
                out, terms = forward(x, logits, statistics)
        if out is not None:
            out = out.to(torch.promote_types(out.dtype, torch.float32))
        if terms is None:
            return out, x.new_zeros(())
        if self._of_layers is not None:
            terms = terms / self._of_layers
        total = terms.sum() + (self._first - 1) * terms[0]
        return out, total if self._of_all is None else total / self._of_all

    def _forward(self, x: Tensor, logits: bool, statistics: bool) -> tuple[Tensor | None, Tensor | None]:
        """Logits, and the distances r_l of ``layers``."""
        if not statistics:
            return self.teacher(x), None
        seen: dict[nn.Module, Tensor] = {}

        def measure(layer: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
            seen[layer] = layer_distance(layer, inputs[0], self._var_weight)
            if not logits and len(seen) == len(self.layers):
                raise _AllSeen

        out = None
        with contextlib.ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(layer.register_forward_pre_hook(measure))
            with contextlib.suppress(_AllSeen):
                out = self.teacher(x)
        if len(seen) < len(self.layers):
            raise RunError(f"teacher {self.name}: its forward pass skipped BatchNorm layers that ran before")
        return out, torch.stack([seen[layer] for layer in self.layers])

    def _compiled_forward(self, x: Tensor, logits: bool, statistics: bool) -> tuple[Tensor | None, Tensor | None]:
        """As ``_forward``, in compiled code that is made at the first call."""
        key = logits, statistics
        if key not in self._compiled:
            layers = self.layers if statistics else []
            self._compiled[key] = CompiledTeacher(
                self.name, self.teacher, layers, _weighing(self._var_weight), logits, self._example, [self._var_weight]
            )
        return self._compiled[key](x)


def tap_teachers(
    teachers: Mapping[str, Teacher],
    logit_names: Sequence[str],
    bn_names: Sequence[str],
    example: Tensor,
    options: RecoverOptions,
    known: Mapping[str, BNTap] | None = None,
) -> dict[str, BNTap]:
    """A tap for every teacher in use, after those that are known.

    Raises:
        UserError: a BN teacher has no BatchNorm layer that runs, and ``allow_null_bn`` is off.
    """
    taps = dict(known or {})
    for name in dict.fromkeys([*logit_names, *bn_names]):
        if name not in taps:
            taps[name] = BNTap(name, teachers[name], example, options)
    for name in bn_names:
        check_layers(name, len(taps[name].layers), options)
    return taps


def check_layers(name: str, layers: int, options: RecoverOptions) -> None:
    """Refuse a BN teacher of which no BatchNorm layer runs.

    Raises:
        UserError: and ``allow_null_bn`` is off.
    """
    if not layers and not options.allow_null_bn:
        raise UserError(
            f"recover.bn_teachers: {name} has no BatchNorm layer to match; remove it, or set "
            "recover.allow_null_bn=true to let it count as 0 as the published code does"
        )


@dataclass(frozen=True)
class Measured:
    """The objective at one batch.

    Attributes:
        loss, ce: L and the cross-entropy, scalars.
        l_bn: L_BN of each member of the BN set, scalars.
        gradient: ∂L/∂x of the batch.
    """

    loss: Tensor
    ce: Tensor
    l_bn: dict[str, Tensor]
    gradient: Tensor


class Objective(Protocol):
    """What a unit is optimised against; the loop over the steps needs nothing else of the teachers."""

    def prepare(self, logit_names: Sequence[str], bn_names: Sequence[str], example: Tensor) -> None:
        """Get ready for a unit.

        Args:
            logit_names: all that its steps may name for the cross-entropy.
            bn_names: all that its steps may name for the BN set.
            example: images to find out which layers run, [≥1, C, S, S] normalised.

        Raises:
            UserError: a BN teacher cannot be matched.
        """
        ...

    def step(self, x: Tensor, y: Tensor, logit_names: Sequence[str], bn_names: Sequence[str]) -> Measured:
        """Measure one augmented batch.

        Args:
            x: normalised float [B, C, S, S], without history.
            y: int64 [B] labels.
            logit_names: teachers of the cross-entropy.
            bn_names: the BN set.
        """
        ...


class LocalObjective:
    """All teachers here, on one device: one forward pass of each, one backward pass of all.

    Args:
        teachers: at least those that units name.
        options: weights of the terms.
    """

    def __init__(self, teachers: Mapping[str, Teacher], options: RecoverOptions):
        self._teachers, self._options = teachers, options
        self._taps: dict[str, BNTap] = {}

    def prepare(self, logit_names: Sequence[str], bn_names: Sequence[str], example: Tensor) -> None:
        """See ``Objective``."""
        # Kept for later units: compiled code belongs to a tap.
        self._taps = tap_teachers(self._teachers, logit_names, bn_names, example, self._options, self._taps)

    def step(self, x: Tensor, y: Tensor, logit_names: Sequence[str], bn_names: Sequence[str]) -> Measured:
        """See ``Objective``."""
        x = x.detach().requires_grad_()
        loss, ce, l_bn = recovery_loss(x, y, self._taps, logit_names, bn_names, self._options)
        # The gradient of the batch alone, whatever the teachers' own flags say.
        with compiling():
            (gradient,) = torch.autograd.grad(loss, [x])
        return Measured(loss.detach(), ce.detach(), {name: v.detach() for name, v in l_bn.items()}, gradient)


def recovery_loss(
    x: Tensor,
    y: Tensor,
    taps: Mapping[str, BNTap],
    logit_names: Sequence[str],
    bn_names: Sequence[str],
    options: RecoverOptions,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The objective on one augmented batch; every teacher runs once, whatever it serves for.

    Args:
        x: normalised float [B, C, S, S].
        y: int64 [B] labels.
        taps: of ``tap_teachers``.
        logit_names: teachers of the cross-entropy.
        bn_names: the BN set B; a member without BN layers adds 0 and counts in |B|.
        options: ``r_bn`` is read here.

    Returns:
        L, the cross-entropy (mean over logit teachers and images) and L_BN of each member of B, all scalars.
    """
    entropies: list[Tensor] = []
    distances: dict[str, Tensor] = {}
    for name in dict.fromkeys([*logit_names, *bn_names]):
        out, distances[name] = taps[name](x, logits=name in logit_names, statistics=name in bn_names)
        if out is not None:
            entropies.append(F.cross_entropy(out, y))
    ce = torch.stack(entropies).mean()
    l_bn = {name: distances[name] for name in bn_names}
    return ce + options.r_bn * torch.stack(list(l_bn.values())).mean(), ce, l_bn
