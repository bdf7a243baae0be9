"""The objective with every teacher by itself, wherever it lives. Plain torch: how parts are reached is the caller's.

The objective is a sum over teachers, so its gradient is one too. Per step the augmented batch goes to the teachers of
the step, and each returns its terms and their gradient: twice the batch's bytes a teacher, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stages.device import reproducible
from stages.recover.compiled import compiling
from stages.recover.objective import BNTap, Measured, check_layers
from stages.recover.options import RecoverOptions

if TYPE_CHECKING:
    from stages.teachers.teacher import Teacher


@dataclass(frozen=True)
class Part:
    """One teacher's terms at one batch.

    Attributes:
        ce, l_bn: unweighted; None where not asked for.
        gradient: of their weighted sum, float32 [B, C, S, S].
    """

    ce: float | None
    l_bn: float | None
    gradient: NDArray[np.float32]


class TeacherPart:
    """One teacher and its terms of the objective.

    Args:
        name: for messages.
        teacher: frozen.
        options: weights inside L_BN.
        device: where it lives.
    """

    def __init__(self, name: str, teacher: Teacher, options: RecoverOptions, device: torch.device | str = "cpu"):
        self._name, self._teacher, self._options, self._device = name, teacher, options, device
        self._tap: BNTap | None = None

    def layers(self, example: NDArray[np.float32]) -> int:
        """How many BatchNorm layers run.

        Raises:
            UserError: one runs twice in a forward pass.
        """
        return len(self._tapped(example).layers)

    def _tapped(self, example: NDArray[np.float32]) -> BNTap:
        if self._tap is None:
            self._tap = BNTap(self._name, self._teacher, self._load(example[:1]), self._options)
        return self._tap

    def measure(
        self, batch: NDArray[np.float32], labels: NDArray[np.int64], ce_weight: float | None, bn_weight: float | None
    ) -> Part:
        """Terms and gradient at one augmented batch.

        Args:
            batch: normalised [B, C, S, S].
            labels: [B].
            ce_weight: of the cross-entropy; None: it is not wanted, and not computed.
            bn_weight: of L_BN, likewise.
        """
        with reproducible(self._options.precision):
            x = self._load(batch).requires_grad_()
            loss, ce, l_bn = x.new_zeros(()), None, None
            logits, distance = self._tapped(batch)(x, ce_weight is not None, bn_weight is not None)
            if bn_weight is not None:
                l_bn = distance
                loss = loss + bn_weight * l_bn
            if ce_weight is not None:
                assert logits is not None
                ce = F.cross_entropy(logits, torch.from_numpy(np.array(labels)).to(x.device))
                loss = loss + ce_weight * ce
            # A teacher without layers to match adds a constant.
            with compiling():
                gradient = torch.autograd.grad(loss, [x])[0] if loss.requires_grad else torch.zeros_like(x)
        return Part(
            None if ce is None else ce.item(), None if l_bn is None else l_bn.item(), gradient.detach().cpu().numpy()
        )

    def _load(self, images: NDArray[np.float32]) -> Tensor:
        # A copy, because what comes from another process is read-only memory.
        return torch.from_numpy(np.array(images)).to(self._device)


class PartLink(Protocol):
    """A way to a ``TeacherPart``: asks without waiting, and returns what waits for the answer."""

    def layers(self, example: NDArray[np.float32]) -> Callable[[], int]:
        """See ``TeacherPart.layers``."""
        ...

    def measure(
        self, batch: NDArray[np.float32], labels: NDArray[np.int64], ce_weight: float | None, bn_weight: float | None
    ) -> Callable[[], Part]:
        """See ``TeacherPart.measure``."""
        ...


class HereLink:
    """The part in this process."""

    def __init__(self, part: TeacherPart):
        self._part = part

    def layers(self, example: NDArray[np.float32]) -> Callable[[], int]:
        """See ``PartLink``."""
        return lambda: self._part.layers(example)

    def measure(
        self, batch: NDArray[np.float32], labels: NDArray[np.int64], ce_weight: float | None, bn_weight: float | None
    ) -> Callable[[], Part]:
        """See ``PartLink``."""
        return lambda: self._part.measure(batch, labels, ce_weight, bn_weight)


class SplitObjective:
    """``Objective`` over parts that work at the same time; their gradients are added in the order of their names here.

    Args:
        links: to at least the teachers that units name.
        options: ``r_bn`` and ``allow_null_bn`` are read.
    """

    def __init__(self, links: Mapping[str, PartLink], options: RecoverOptions):
        self._links, self._options = links, options

    def prepare(self, logit_names: Sequence[str], bn_names: Sequence[str], example: Tensor) -> None:
        """See ``Objective``."""
        images = example.detach().cpu().numpy()
        asked = {name: self._links[name].layers(images) for name in dict.fromkeys([*logit_names, *bn_names])}
        found = {name: layers() for name, layers in asked.items()}
        for name in bn_names:
            check_layers(name, found[name], self._options)

    def step(self, x: Tensor, y: Tensor, logit_names: Sequence[str], bn_names: Sequence[str]) -> Measured:
        """See ``Objective``."""
        batch, labels = x.detach().cpu().numpy(), y.cpu().numpy()
        asked = {
            name: self._links[name].measure(
                batch,
                labels,
                1 / len(logit_names) if name in logit_names else None,
                self._options.r_bn / len(bn_names) if name in bn_names else None,
            )
            for name in dict.fromkeys([*logit_names, *bn_names])
        }
        parts = {name: answer() for name, answer in asked.items()}
        ce = torch.tensor([parts[name].ce for name in logit_names], device=x.device).mean()
        l_bn = {name: torch.tensor(parts[name].l_bn, device=x.device) for name in bn_names}
        gradient = torch.zeros_like(x)
        for part in parts.values():
            gradient += torch.from_numpy(part.gradient.copy()).to(x.device)
        loss = ce + self._options.r_bn * torch.stack(list(l_bn.values())).mean()
        return Measured(loss, ce, l_bn, gradient)
