"""One teacher's forward pass and BN distances as compiled code (``recover.compile``).

A function of its own for every teacher, not for every subset of a pool, so that a pool compiles once whatever is drawn
from it. What nobody asks for (logits, and the layers between the last BatchNorm and them) is not computed, and what the
backward pass needs beside the inputs of the BN layers, it computes again instead of keeping it.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cluster.errors import TransientError, UserError, first_line
from stages.recover.compiler import OFF, kept_code
from stages.recover.frozen import fold_batch_norm
from stages.recover.speed import processor
from stages.teachers.build import memory_format

if TYPE_CHECKING:
    from stages.teachers.teacher import Teacher


class CompiledTeacher:
    """A compiled function [B, C, S, S] → (logits or None, distances [layers] or None); see ``compiling`` for errors.

    It compiles at the first call, and at the first with images of another shape.

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
        distance: Callable[[nn.BatchNorm2d, Tensor], Tensor],
        logits: bool,
        example: Tensor,
        known: Sequence[object] = (),
    ):
        # A network with hooks for good, because compiled code keeps those that it was made with; the same weights.
        memo: dict[int, object] = {id(tensor): tensor for tensor in (*teacher.parameters(), *teacher.buffers())}
        seen: dict[int, Tensor] = {}

        def measure_as(index: int) -> Callable[[nn.BatchNorm2d, tuple[Tensor]], None]:
            def measure(layer: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
                seen[index] = distance(layer, inputs[0])

            return measure

        try:
            network = copy.deepcopy(teacher, memo)
            fold_batch_norm(network)
            for index, layer in enumerate(layers):
                tapped = memo[id(layer)]
                assert isinstance(tapped, nn.BatchNorm2d)
                tapped.register_forward_pre_hook(measure_as(index))
            with torch.no_grad():
                network(example)
            if len(seen) != len(layers):
                raise ValueError("its copy does not run its own layers")
            seen.clear()
        except Exception as error:
            raise UserError(
                f"recover.compile: teacher {name} cannot be copied ({first_line(error)}); mend it, {OFF}"
            ) from None
        count = len(layers)

        def run(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
            # Empty before and after, or torch would compile once for each. Before: the last pass may have failed.
            seen.clear()
            out = network(x)
            terms = torch.stack([seen[index] for index in range(count)]) if count else None
            seen.clear()
            return out if logits else None, terms

        # torch counts recompilations by code object, and gives up after a few: each teacher has one of its own.
        own = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
        options: dict[str, str | int | bool | Callable[..., object]] = {
            # No choice among kernels by their time, for they add in different orders.
            "deterministic": True,
            "shape_padding": False,
            # Where channels last are not safe, see ``memory_format``.
            "layout_optimization": memory_format(teacher.network) == torch.channels_last,
        }
        # As a whole or not at all: what runs between two parts of a network would not be compiled, and which parts are
        # would depend on what the process did before.
        self._run = torch.compile(own, dynamic=False, fullgraph=True, options=options)
        self._ready: set[torch.Size] = set()
        self._known = [repr(network), teacher.space, count, logits, *known, dict(options)]

    def __call__(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits and distances."""
        if x.shape not in self._ready:
            autocast = torch.is_autocast_enabled(x.device.type)
            kept_code([*self._known, processor(x.device), list(x.shape), autocast], lambda: self._try_out(x))
            self._ready.add(x.shape)
        return self._run(x)  # type: ignore[no-any-return]

    def _try_out(self, x: Tensor) -> None:
        """Forward and backward, both of which compile at their first call."""
        x = x.detach().requires_grad_()
        found = [out.float().sum() for out in self._run(x) if out is not None]
        torch.autograd.grad(torch.stack(found).sum(), [x])


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
