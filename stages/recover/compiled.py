"""One teacher's forward pass and BN distances as compiled code (``recover.compile``).

A function of its own for every teacher, not for every subset of a pool, so that a pool compiles once whatever is drawn
from it. What nobody asks for (logits, and the layers between the last BatchNorm and them) is not computed, and what the
backward pass needs beside the inputs of the BN layers, it computes again instead of keeping it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cluster.errors import TransientError, UserError, first_line
from stages.recover.compiler import OFF, Code, kept_code
from stages.recover.frozen import fold_batch_norm
from stages.recover.speed import processor
from stages.recover.traced import Untold, sources, traced_from
from stages.teachers.build import memory_format

if TYPE_CHECKING:
    from stages.teachers.teacher import Teacher

log = logging.getLogger("prism")

# What torch says where code that was compiled ahead of time is not for the arguments or the process's settings.
GUARD = "GuardManager check failed"
Distance = Callable[[nn.BatchNorm2d, Tensor], Tensor]
Found = tuple[Tensor | None, Tensor | None]
"""Logits and distances."""


class CompiledTeacher:
    """A compiled function [B, C, S, S] → (logits or None, distances [layers] or None); see ``compiling`` for errors.

    It compiles at the first call, and at the first with images of another shape. What it gives has a gradient.

    Args:
        name: for messages.
        teacher: frozen; its hooks are left alone.
        layers: BN layers of it that each forward pass runs once.
        distance: (layer, its input) → scalar.
        logits: whether they are wanted.
        example: images to try it out with, [1, C, S, S].
        known: what ``distance`` depends on beside the layer.

    Raises:
        UserError: the network does not work as a copy.
    """

    def __init__(
        self,
        name: str,
        teacher: Teacher,
        layers: Sequence[nn.BatchNorm2d],
        distance: Distance,
        logits: bool,
        example: Tensor,
        known: Sequence[object] = (),
    ):
        try:
            self._network = _Tapped(teacher, layers, distance, logits)
            with torch.no_grad():
                self._network(example)
        except Exception as error:
            raise UserError(
                f"recover.compile: teacher {name} cannot be copied ({first_line(error)}); mend it, {OFF}"
            ) from None
        self._options: dict[str, Any] = {
            # No choice among kernels by their time, for they add in different orders.
            "deterministic": True,
            "shape_padding": False,
            # Where channels last are not safe, see ``memory_format``.
            "layout_optimization": memory_format(teacher.network) == torch.channels_last,
        }
        self._code: dict[tuple[torch.Size, torch.dtype], Code] = {}
        self._known = [repr(self._network), teacher.space, len(layers), logits, *known, self._options]
        try:
            # Of the teacher around it, ``space`` above tells what counts.
            self._known += traced_from(self._network.network.network)
            self._known += sources([__name__, distance.__module__, type(teacher).__module__])
            self._nameable = True
        except (Untold, RecursionError):
            # Every process traces it.
            self._nameable = False

    def __call__(self, x: Tensor) -> Found:
        """Logits and distances."""
        # As it was compiled for.
        x = x.contiguous() if x.requires_grad else x.detach().contiguous().requires_grad_()
        key = x.shape, x.dtype
        with torch.enable_grad():
            if key not in self._code:
                self._code[key] = self._prepare(x)
            try:
                found: Found = self._code[key](self._network, x)
            except RuntimeError as error:
                if GUARD not in str(error):
                    raise
                # The process is not in the state that the code was made for.
                self._code[key] = self._prepare(x)
                found = self._code[key](self._network, x)
        return found

    def _prepare(self, x: Tensor) -> Code:
        about = [processor(x.device), list(x.shape), str(x.dtype), torch.is_autocast_enabled(x.device.type)]
        known = [*self._known, self._nameable, *about]
        return kept_code(known, lambda: self._compile(x), self._network, x)

    def _compile(self, x: Tensor) -> Code:
        # As a whole or not at all: what runs between two parts of a network would not be compiled, and which parts are
        # would depend on what the process did before.
        from torch._dynamo.exc import PackageError, TorchDynamoException

        # torch counts recompilations by code object, and gives up after a few: each teacher has one of its own.
        own = types.FunctionType(_pass.__code__.replace(), _pass.__globals__, _pass.__name__)
        compiled: Any = torch.compile(own, dynamic=False, fullgraph=True, options=self._options)
        if self._nameable:
            try:
                # Forward and backward.
                code: Code = compiled.aot_compile(((self._network, x), {}))
                return code
            except Exception as error:
                if isinstance(error, TorchDynamoException) and not isinstance(error, PackageError):
                    raise
                # torch cannot write it to a file; what else may be wrong with it will show.
                log.info("recover.compile: traced by every process: %s", first_line(error))
        found = [out.float().sum() for out in compiled(self._network, x) if out is not None]
        torch.autograd.grad(torch.stack(found).sum(), [x])
        return compiled  # type: ignore[no-any-return]


class _Tapped(nn.Module):
    """A copy of a teacher that shares its weights and has hooks for good, since compiled code keeps those it met.

    Args:
        teacher, layers, distance, logits: see ``CompiledTeacher``.
    """

    def __init__(self, teacher: Teacher, layers: Sequence[nn.BatchNorm2d], distance: Distance, logits: bool):
        super().__init__()
        memo: dict[int, object] = {id(tensor): tensor for tensor in (*teacher.parameters(), *teacher.buffers())}
        self.network = copy.deepcopy(teacher, memo)
        fold_batch_norm(self.network)
        self._seen: dict[int, Tensor] = {}
        self._count, self._logits, self._distance = len(layers), logits, distance
        for index, layer in enumerate(layers):
            tapped = memo[id(layer)]
            assert isinstance(tapped, nn.BatchNorm2d)
            tapped.register_forward_pre_hook(self._measure_as(index))

    def _measure_as(self, index: int) -> Callable[[nn.BatchNorm2d, tuple[Tensor]], None]:
        def measure(layer: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
            self._seen[index] = self._distance(layer, inputs[0])

        return measure

    def forward(self, x: Tensor) -> Found:
        """Logits and distances."""
        # Empty before and after: it is nothing that code could depend on. Before: the last pass may have failed.
        self._seen.clear()
        out = self.network(x)
        if len(self._seen) != self._count:
            raise ValueError("its copy does not run its own layers")
        terms = torch.stack([self._seen[index] for index in range(self._count)]) if self._count else None
        self._seen.clear()
        return out if self._logits else None, terms


def _pass(network: nn.Module, x: Tensor) -> Found:
    """What is compiled; weights are those of the network that it is called with."""
    found: Found = network(x)
    return found


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """For a body that calls compiled teachers and their backward passes, which compile at their first call too.

    Raises:
        UserError: a teacher's code is such that it cannot be compiled.
        TransientError: the machine did not get it done.
    """
    try:
        yield
    except RuntimeError as error:
        # Here, because this part of torch takes seconds to import, and few runs need it.
        from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

        if not isinstance(error, TorchDynamoException):
            raise
        if isinstance(error, BackendCompilerFailed):
            reason = first_line(getattr(error, "inner_exception", error))
            raise TransientError(
                f"recover.compile: a teacher did not get compiled here ({reason}); mend it, {OFF}"
            ) from error
        raise UserError(
            f"recover.compile: a teacher cannot be compiled ({first_line(error)}); mend it, {OFF}"
        ) from error
