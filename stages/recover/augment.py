"""The augmentation of a recovery step: RandomResizedCrop, then flip, then circular shift.

All three only move samples along rows and columns, so one step is two small matrix products, A_y · image ·
A_xᵀ: the same code for one view of the whole batch and for one view an image, and, unlike the backward passes of
``interpolate`` and ``gather`` on GPUs, the same sums in the same order every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.rng import generator
from stages.crops import draw_crops
from stages.device import moved
from stages.recover.options import RecoverOptions


@dataclass(frozen=True)
class Augmentation:
    """Parameters of one step: k rows, 1 = shared by the whole batch.

    Attributes:
        crop: int64 [k, 4] (top, left, height, width) in pixels.
        flip: bool [k], left to right.
        shift: int64 [k, 2] (dy, dx), 0 … roll.
    """

    crop: NDArray[np.int64]
    flip: NDArray[np.bool_]
    shift: NDArray[np.int64]


def draw_augmentation(seed: int, step: int, batch: int, size: int, options: RecoverOptions) -> Augmentation:
    """Draw a step's parameters, a function of the arguments alone.

    Args:
        seed: of the unit.
        step: t.
        batch: images B.
        size: their side in pixels.
        options: ``crop``, ``flip``, ``roll`` and ``batch_augment`` are read.
    """
    rng = generator(seed, "augment", step)
    count = 1 if options.batch_augment == "batch" else batch
    return Augmentation(
        crop=draw_crops(rng, count, size, options.crop.min_scale),
        flip=(rng.random(count) < 0.5) & options.flip,
        shift=rng.integers(0, options.roll + 1, (count, 2)),
    )


def augment(x: Tensor, drawn: Augmentation) -> Tensor:
    """Crop (bilinear back to full size, ``align_corners=False``), flip and shift images.

    A crop is never larger than the image, so antialiasing would change nothing.

    Args:
        x: float [B, C, S, S].
        drawn: with 1 or B rows.

    Returns:
        The same shape, dtype and device; gradients reach ``x``.
    """
    size = x.shape[-1]
    top, left, height, width = drawn.crop.T
    rows = _source(top, height, drawn.shift[:, 0], np.zeros_like(drawn.flip), size)
    columns = _source(left, width, drawn.shift[:, 1], drawn.flip, size)
    return _weights(rows, x) @ x @ _weights(columns, x).transpose(-1, -2)


def _source(
    start: NDArray[np.int64],
    length: NDArray[np.int64],
    shift: NDArray[np.int64],
    flip: NDArray[np.bool_],
    size: int,
) -> NDArray[np.float64]:
    """Where in the image every output sample of an axis lies, in pixels, [k, size]."""
    before_shift = (np.arange(size) - shift[:, None]) % size
    before_flip = np.where(flip[:, None], size - 1 - before_shift, before_shift)
    in_crop = (before_flip + 0.5) * (length[:, None] / size) - 0.5
    return np.clip(in_crop, 0.0, length[:, None] - 1.0) + start[:, None]


def _weights(source: NDArray[np.float64], like: Tensor) -> Tensor:
    """Bilinear weights as matrices [k, 1, size, size]: sample at s reads pixel j with max(0, 1 − |s − j|)."""
    at = moved(torch.from_numpy(source), like.device).to(like.dtype)
    pixel = torch.arange(source.shape[1], device=like.device, dtype=like.dtype)
    return (1 - (at[:, None, :, None] - pixel).abs()).clamp_min(0)
