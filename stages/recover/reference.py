"""A step of recovery the way the published PRISM code works: the baseline of speed, and in float64 the oracle.

Written from the formulas. The primary is there twice, once for its logits and once for its statistics; every network
runs to its end; statistics are taken from a copy of every activation with the channels in front; all is float32 in
NCHW, and nothing is compiled. Of what the published step does for nothing, the copy of the best images is kept; terms
that are computed and dropped, and the verifier, are not.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from stages.teachers.build import bn_layers


class _Statistics:
    """‖v − s‖ + ‖m − μ‖ of the input of one BatchNorm layer."""

    value: Tensor | None = None

    def __init__(self, layer: nn.BatchNorm2d):
        layer.register_forward_pre_hook(self._measure)

    def _measure(self, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        x: Any = inputs[0]
        mean = x.mean((0, 2, 3))
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        self.value = torch.linalg.vector_norm(layer.running_var - var) + torch.linalg.vector_norm(
            layer.running_mean - mean
        )


class ReferenceStep:
    """The objective, and a step of its optimisation.

    Args:
        pool: name → network that takes normalised images, with BatchNorm layers.
        primary: whose logits count.
        matched: the BN set, names of the pool.
        r_bn: weight of its loss.
        first: weight of each network's first BN layer.
        tf32: GPUs may round factors to TF32, as nobody had switched on for the published figures.
    """

    def __init__(
        self,
        pool: Mapping[str, nn.Module],
        primary: str,
        matched: Sequence[str],
        r_bn: float,
        first: float = 10.0,
        tf32: bool = False,
    ):
        self._logits = _frozen(pool[primary])
        self._matched = [_frozen(pool[name]) for name in matched]
        self._statistics = [[_Statistics(layer) for layer in bn_layers(network)] for network in self._matched]
        self._r_bn, self._first, self._tf32 = r_bn, first, tf32

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """L of the batch, a scalar.

        Args:
            x: float [B, C, S, S], augmented.
            y: int64 [B].
        """
        total = F.cross_entropy(self._logits(x), y)
        for network, layers in zip(self._matched, self._statistics, strict=True):
            network(x)
            # Without those that are there for training alone; a network without any counts as 0.
            values = [layer.value for layer in layers if layer.value is not None]
            distance = sum(values) + (self._first - 1) * values[0] if values else 0.0
            total = total + self._r_bn / len(self._matched) * distance
        return total

    def optimise(self, x: Tensor, y: Tensor, steps: int, lr: float, low: Tensor, high: Tensor, roll: int) -> Tensor:
        """Some steps from given images: crop, flip, shift, loss, Adam, clamp.

        Args:
            x: normalised float32 [B, C, S, S].
            y: int64 [B].
            steps: as many.
            lr: at the beginning of the cosine.
            low: least valid values, as they broadcast with ``x``.
            high: greatest valid values.
            roll: largest shift.

        Returns:
            The images after the last step.
        """
        x = x.detach().clone().requires_grad_()
        augment = v2.Compose([v2.RandomResizedCrop(x.shape[-1], antialias=True), v2.RandomHorizontalFlip()])
        optimizer = torch.optim.Adam([x], lr=lr, betas=(0.5, 0.9), eps=1e-8)
        best_loss = math.inf
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * step / steps)) * lr
            shift = torch.randint(0, roll + 1, (2,)).tolist()
            optimizer.zero_grad()
            with _rounding(self._tf32):
                loss = self.loss(torch.roll(augment(x), shift, (2, 3)), y)
                loss.backward()
            optimizer.step()
            with torch.no_grad():
                x.clamp_(low, high)
            if loss.item() < best_loss or step == 1:
                # As published, where nobody reads it.
                _, best_loss = x.detach().clone(), loss.item()
        return x.detach()


@contextlib.contextmanager
def _rounding(tf32: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            yield
    finally:
        matmul.allow_tf32 = before


def _frozen(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).eval().requires_grad_(False)
