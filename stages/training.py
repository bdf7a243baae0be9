"""What training teachers and training students have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: weight decay on weights, none on biases and norms (everything of one dimension)."""
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(
    network: nn.Module,
    kind: Literal["sgd", "adamw"],
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """SGD or AdamW over ``parameter_groups``; the last two arguments are SGD's."""
    groups = parameter_groups(network, weight_decay)
    # Fused kernels: one call for all parameters, which is what counts for small networks.
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Compute with so many torch threads in the body; None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
