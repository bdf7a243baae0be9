"""Augmentation of training images: random crop (padded or resized) and flip, on the device, drawn by counter."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import UserError
from stages.crops import draw_crops
from stages.data import DataSpec
from stages.recover.augment import Augmentation, augment
from stages.squeeze.options import SqueezeOptions


def check_squeeze(options: SqueezeOptions, data: DataSpec) -> None:
    """Prove that the images suffice for the augmentation.

    Raises:
        UserError: ``crop_padding`` reflects more than there is.
    """
    if options.crop_padding >= data.image_size:
        raise UserError(
            f"squeeze.crop_padding: {options.crop_padding} pixels cannot be reflected at images of side "
            f"{data.image_size}; choose less than data.image_size"
        )


def augmented(pixels: Tensor, rng: np.random.Generator, options: SqueezeOptions, data: DataSpec) -> Tensor:
    """A training batch.

    Args:
        pixels: uint8 [B, C, S, S], on any device.
        rng: all that is random comes from here.
        options: ``crop_padding`` or ``crop_min_scale``, and ``flip``.
        data: normalisation.

    Returns:
        Data-normalised float32 [B, C, S, S].
    """
    count, size = pixels.shape[0], pixels.shape[-1]
    flip = (rng.random(count) < 0.5) & options.flip
    if options.crop_min_scale is not None:
        crop = draw_crops(rng, count, size, options.crop_min_scale)
        return augment(data.normalise(pixels), Augmentation(crop, flip, np.zeros((count, 2), np.int64)))
    if options.crop_padding or flip.any():
        shift = rng.integers(-options.crop_padding, options.crop_padding + 1, (2, count))
        pixels = shift_and_flip(pixels, shift, flip)
    return data.normalise(pixels)


def shift_and_flip(pixels: Tensor, shift: NDArray[np.int64], flip: NDArray[np.bool_]) -> Tensor:
    """Crop S × S out of the image continued by reflection, then mirror left to right.

    Args:
        pixels: any dtype [B, C, S, S].
        shift: int64 [2, B], rows and columns by which the crop is off the image, less than S.
        flip: bool [B].
    """
    size = pixels.shape[-1]
    place = torch.from_numpy(shift)[:, :, None] + torch.arange(size)
    place[1] = torch.where(torch.from_numpy(flip)[:, None], place[1].flip(1), place[1])
    # Reflection without repeating the edge: −1 → 1, S → S − 2.
    rows, columns = ((size - 1) - ((size - 1) - place.abs()).abs()).to(pixels.device)
    images = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    # Channels last while picking, so that a whole pixel moves at once.
    picked = pixels.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)
