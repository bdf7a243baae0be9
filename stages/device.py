"""Where a worker computes, and how it does so with the same bytes every time."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor


def pick_device(gpu: bool) -> torch.device:
    """The GPU where one is wanted and visible, else the CPU.

    Args:
        gpu: False where the pool asks for no GPU (``gpus: 0``): the process may see one that belongs to others.
    """
    return torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")


def reuse_memory(on: bool = True) -> None:
    """Whether memory that is freed stays with the process, for what it computes next on the CPU (glibc alone).

    glibc gives every tensor of more than 32 MB back when it is freed, and the system clears the pages of the next one,
    which takes a third to a half of a recovery step at 224 px. Kept memory is as much as the process once needed, and
    that of the main thread alone, which is where actors work.

    Args:
        on: False: as glibc does by itself, after it has seen large tensors.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        return
    # Numbers of malloc.h. -1: never.
    trim_threshold, top_pad, mmap_threshold, mmap_max = -1, -2, -3, -4
    mallopt(mmap_threshold, 32 << 20)
    mallopt(mmap_max, 0 if on else 65536)
    mallopt(trim_threshold, -1 if on else 64 << 20)
    mallopt(top_pad, 64 << 20 if on else 128 << 10)
    if not on:
        trim(0)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """The same values on the device; the caller does not wait for what a GPU has to do before."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    # Only from pinned memory do copies wait in the GPU's queue instead of making the CPU wait.
    return values.pin_memory().to(device, non_blocking=True)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Networks compute in bfloat16 in its body where ``precision`` is bf16, else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def reproducible(precision: str | None = None) -> Iterator[None]:
    """cuDNN computes the same bytes from the same work on the same GPU.

    No timing-based choice among its algorithms, and none that adds in whatever order threads come. That goes for all
    that the built-in networks are made of; a network of the user's may have layers whose own kernels add so (the
    backward pass of adaptive pooling to more than one pixel, of interpolation).

    Args:
        precision: where it is tf32, convolutions round float32 factors to TF32, else not; other products never do.
            None: as the process has it.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark, cudnn.deterministic = False, True
    if precision is not None:
        # Pixels are cropped and resized by matrix products, which stay exact.
        cudnn.allow_tf32, matmul.allow_tf32 = precision == "tf32", False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before
