"""One teacher's forward pass and BN distances as compiled code (``recover.compile``).

A function of its own for every teacher, not for every subset of a pool, so that a pool compiles once whatever is drawn
from it. What nobody asks for (logits, and the layers between the last BatchNorm and them) is not computed, and what the
backward pass needs beside the inputs of the BN layers, it computes again instead of keeping it.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from cluster.errors import UserError

if TYPE_CHECKING:
    from stages.teachers.teacher import Teacher


class CompiledTeacher:
    """A compiled function [B, C, S, S] → (logits or None, distances [layers] or None).

    Args:
        name: for messages.
        teacher: frozen; its hooks are left alone.
        layers: BN layers of it that each forward pass runs once.
        distance: (layer, its input) → scalar.
        logits: whether they are wanted.
    """

    def __init__(
        self,
        name: str,
        teacher: Teacher,
        layers: Sequence[nn.BatchNorm2d],
        distance: Callable[[nn.BatchNorm2d, Tensor], Tensor],
        logits: bool,
    ):
        self._name = name
        # A network with hooks for good, because compiled code keeps those that it was made with; the same weights.
        memo: dict[int, object] = {id(tensor): tensor for tensor in (*teacher.parameters(), *teacher.buffers())}
        network = copy.deepcopy(teacher, memo)
        seen: dict[int, Tensor] = {}

        def measure_as(index: int) -> Callable[[nn.BatchNorm2d, tuple[Tensor]], None]:
            def measure(layer: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
                seen[index] = distance(layer, inputs[0])

            return measure

        for index, layer in enumerate(layers):
            tapped = memo[id(layer)]
            assert isinstance(tapped, nn.BatchNorm2d)
            tapped.register_forward_pre_hook(measure_as(index))
        count = len(layers)

        def run(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
            seen.clear()
            out = network(x)
            terms = torch.stack([seen[index] for index in range(count)]) if count else None
            return out if logits else None, terms

        # torch counts recompilations by code object, and gives up after a few: each teacher has one of its own.
        own = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
        self._run = torch.compile(own, dynamic=False)

    def __call__(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Compiles at the first call, and at the first with images of another shape.

        Raises:
            UserError: it cannot be compiled.
        """
        try:
            return self._run(x)  # type: ignore[no-any-return]
        except TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(
                f"recover.compile: torch.compile does not take teacher {self._name} ({reason.strip()}); set "
                "recover.compile=false"
            ) from error
