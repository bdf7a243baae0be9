"""One of the processes that train a network together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together.

    Attributes:
        device: to train on.
        rank, world: which of how many.
        wrap: makes the trained module of a network (DistributedDataParallel).
    """

    device: str = "cpu"
    rank: int = 0
    world: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda network: network
