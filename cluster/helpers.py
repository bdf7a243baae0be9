"""Actors of an actor: each holds one object, all come and go with the one that made them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import ray
import torch

from cluster import preemption
from cluster.errors import HelperLost

# An autoscaler sees within seconds what actors wait for; the machine that it starts stays for longer without work.
PATIENCE_S = 180.0


class _Helper:
    """Holds one object; made in a method, because an actor that raises in its constructor says no more than that."""

    def make(self, factory: Callable[..., Any], kwargs: dict[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self._held = factory(**kwargs)

    def ready(self) -> None:
        """Answers once there is room for this actor."""

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self._held, method)(*args)


class Helpers:
    """One helper for every name: all have room at the same time, or none keeps any.

    Helpers belong to the actor that makes them, and Ray ends them with it, however it ends. They are not restarted: the
    objects would be lost all the same. Their maker ends, and its successor makes new ones.

    They are in no placement group, which would give them their room in one step: in Ray 2.60 the group of an actor goes
    when the actor and its whole job have ended, so every actor that died would leave its share of the cluster blocked.

    Args:
        makers: name → importable factory and its arguments: paths, ids and options.
        cpus: of one helper.
        gpus: of one helper.
        threads: torch threads of one helper.

    Raises:
        PrismError: a factory raised it.
        HelperLost: a helper died while it was made, or this process got a notice while it waited for room.
    """

    # (GPUs, torch threads) of the helpers of this process, which its own share does not hold.
    held: ClassVar[tuple[float, int]] = (0.0, 0)

    def __init__(
        self, makers: Mapping[str, tuple[Callable[..., Any], dict[str, Any]]], cpus: float, gpus: float, threads: int
    ):
        kind: Any = ray.remote(_Helper).options(num_cpus=cpus, num_gpus=gpus)
        self._actors = _together(lambda: {helper: kind.remote() for helper in makers})
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


def _together(start: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Actors that all run.

    Several makers that each hold a part of what is left would wait for each other for ever. So one that does not get
    all in time lets go of all, for a time that differs from maker to maker.
    """
    while True:
        actors = start()
        waiting = [actor.ready.remote() for actor in actors.values()]
        end = time.monotonic() + PATIENCE_S
        # For hours where nodes are to come; a machine that is told to go meanwhile holds nothing worth keeping.
        while waiting and time.monotonic() < end:
            if preemption.noticed():
                raise HelperLost("this machine is about to be taken away")
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1.0)
            for ref in done:
                _result(ref)
        if not waiting:
            return actors
        for actor in actors.values():
            ray.kill(actor)
        time.sleep(random.uniform(0.0, 10.0))


def _result(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    except ray.exceptions.RayError as error:
        # Its death, by the machine's or for want of memory, or that there is no room for it any more.
        raise HelperLost(f"an actor of this unit's teachers died ({str(error).strip().splitlines()[0]})") from None
