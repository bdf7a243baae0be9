"""Actors of an actor: each holds one object, all come and go with the one that made them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import ray
import torch
from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import preemption
from cluster.errors import HelperLost


class _Helper:
    """Holds one object; made in a method, because an actor that raises in its constructor says no more than that."""

    def make(self, factory: Callable[..., Any], kwargs: dict[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self._held = factory(**kwargs)

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self._held, method)(*args)


class Helpers:
    """One helper for every name, in a placement group: all have room, or none is started.

    Helpers are not restarted: the objects would be lost all the same. Their maker ends, and its successor makes new
    ones. Of an actor that dies and is restarted Ray ends the helpers, but not the group; so the group bears the actor's
    name, and the successor removes it.

    Args:
        makers: name → importable factory and its arguments: paths, ids and options.
        cpus: of one helper.
        gpus: of one helper.
        threads: torch threads of one helper.

    Raises:
        PrismError: a factory raised it.
        HelperLost: a helper died while it was made.
    """

    # (GPUs, torch threads) of the helpers of this process, which its own share does not hold.
    held: ClassVar[tuple[float, int]] = (0.0, 0)

    def __init__(
        self, makers: Mapping[str, tuple[Callable[..., Any], dict[str, Any]]], cpus: float, gpus: float, threads: int
    ):
        name = f"prism-{ray.get_runtime_context().get_actor_id()}"
        with contextlib.suppress(ValueError):
            remove_placement_group(get_placement_group(name))
        bundle = {kind: amount for kind, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
        # Close together where they fit, since batches and gradients travel at every step.
        group = placement_group([bundle] * len(makers), strategy="PACK", name=name)
        # For hours where nodes are to come; a machine that is told to go meanwhile holds nothing worth keeping.
        while not group.wait(1.0):
            if preemption.noticed():
                raise HelperLost("this machine is about to be taken away")
        kind: Any = ray.remote(_Helper)
        self._actors = {
            helper: kind.options(
                num_cpus=cpus,
                num_gpus=gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            ).remote()
            for index, helper in enumerate(makers)
        }
        made = [self._actors[helper].make.remote(*maker, threads) for helper, maker in makers.items()]
        for ref in made:
            _result(ref)
        Helpers.held = gpus * len(makers), threads * len(makers)

    def call(self, helper: str, method: str, *args: Any) -> Callable[[], Any]:
        """Ask a helper without waiting; what is returned waits.

        Args:
            helper: name.
            method: of the object it holds.
            *args: arrays among them are not copied on one machine.
        """
        ref = self._actors[helper].call.remote(method, args)
        return lambda: _result(ref)


def _result(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    except ray.exceptions.RayError as error:
        # Its death, by the machine's or for want of memory, or that there is no room for it any more.
        raise HelperLost(f"an actor of this unit's teachers died ({str(error).strip().splitlines()[0]})") from None
