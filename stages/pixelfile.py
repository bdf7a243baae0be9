"""Decoded images in a file that many processes map: pixels one after the other, then their labels.

Mapped, they take the node's memory once, as pages that the system may drop, and no process's own.
"""

from __future__ import annotations

import mmap
import warnings

import numpy as np
import torch
from torch import Tensor

from stages.data import DataSpec

LABEL_BYTES = np.dtype(np.int64).itemsize


def row_bytes(data: DataSpec) -> int:
    """Bytes of an image with its label."""
    return data.image_bytes + LABEL_BYTES


def map_pixels(source: int, data: DataSpec) -> tuple[Tensor, Tensor]:
    """Open what a file descriptor holds.

    Returns:
        uint8 [N, C, S, S], not to be written to, and int64 [N].
    """
    mapped = mmap.mmap(source, 0, access=mmap.ACCESS_READ)
    count = len(mapped) // row_bytes(data)
    length = count * data.image_bytes
    images = np.frombuffer(mapped, np.uint8, length)
    labels = np.frombuffer(mapped, np.int64, offset=length).copy()
    with warnings.catch_warnings():
        # That tensors cannot be read-only; nobody writes to this one.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        pixels = torch.from_numpy(images)
    return pixels.view(count, data.channels, data.image_size, data.image_size), torch.from_numpy(labels)
