"""Where an actor computes."""

from __future__ import annotations

import torch


def pick_device(gpu: bool) -> torch.device:
    """The GPU where one is wanted and visible, else the CPU.

    Args:
        gpu: False where the pool asks for no GPU (``gpus: 0``): the process may see one that belongs to others.
    """
    return torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
