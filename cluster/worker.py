"""One of the processes that train a network together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together.

    Attributes:
        device: to train on.
        rank, world: which of how many.
        wrap: makes the trained module of a network (DistributedDataParallel).
        gpus: that one of them reserves, where it has any.
    """

    device: str = "cpu"
    rank: int = 0
    world: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda network: network
    gpus: float = 1.0

    @property
    def share(self) -> dict[str, Any]:
        """``gpus`` that all of them have, or else ``cpus``: torch threads."""
        gpu = self.device.startswith("cuda")
        return {"gpus": self.world * self.gpus} if gpu else {"cpus": float(self.world * torch.get_num_threads())}
