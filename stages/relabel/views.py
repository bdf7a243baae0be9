"""Views: what an epoch shows of every image, drawn by counter and rendered the same for teacher and student.

``draw_views`` decides, ``render_views`` computes pixels. A view is a crop resized to the full image, perhaps
flipped, perhaps mixed with the view of a partner image. Its numbers are stored beside the logits, so a
student renders exactly what the teachers saw, in batches of any size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.rng import generator
from stages.crops import draw_crops
from stages.data import DataSpec
from stages.device import moved
from stages.relabel.options import RelabelOptions


@dataclass(frozen=True)
class EpochViews:
    """The views of all N images in one epoch; rows of all but ``order`` are image ids.

    Boxes are (top, left, height, width) as fractions of the side; they lie on the pixel grid, so that
    ``rint(box · side)`` gives back the integers exactly.

    Attributes:
        crop: float32 [N, 4], the part of the image that is shown.
        flip: bool [N], mirrored left to right after the crop.
        partner: int64 [N], image that is mixed in; the image itself where nothing is.
        lam: float32 [N], share λ of the image's own view; 1 where nothing is mixed in.
        box: float32 [N, 4], where CutMix shows the partner's view; without area the two are blended,
            λ to 1 − λ.
        order: int64 [N], position in the epoch → image id; a permutation.
    """

    crop: NDArray[np.float32]
    flip: NDArray[np.bool_]
    partner: NDArray[np.int64]
    lam: NDArray[np.float32]
    box: NDArray[np.float32]
    order: NDArray[np.int64]


def draw_views(seed: int, epoch: int, num_images: int, size: int, options: RelabelOptions) -> EpochViews:
    """Draw the views of an epoch, a function of the arguments alone.

    Crop and flip belong to an image, not to its role: mixed into another image it shows the same view as on
    its own. Partners form one random cycle through all images, so none is its own (unless there is just one).

    Args:
        seed: of the run.
        epoch: from 0.
        num_images: N.
        size: side S of the images in pixels.
        options: ``crop``, ``flip`` and ``mix`` are read.
    """
    rng = generator(seed, "views", epoch)
    order = rng.permutation(num_images)
    crop = draw_crops(rng, num_images, size, options.crop.min_scale)
    flip = rng.random(num_images) < 0.5
    lam, box = np.ones(num_images), np.zeros((num_images, 4))
    partner = np.arange(num_images)
    if options.mix.kind != "none":
        cycle = rng.permutation(num_images)
        partner[cycle] = np.roll(cycle, -1)
        lam = rng.beta(options.mix.alpha, options.mix.alpha, num_images)
    if options.mix.kind == "cutmix":
        box = _draw_boxes(rng, lam, size)
        lam = 1 - box[:, 2] * box[:, 3] / size**2
    return EpochViews(
        crop=(crop / size).astype(np.float32),
        flip=flip & options.flip,
        partner=partner.astype(np.int64),
        lam=lam.astype(np.float32),
        box=(box / size).astype(np.float32),
        order=order.astype(np.int64),
    )


def _draw_boxes(rng: np.random.Generator, lam: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """CutMix boxes in pixels, [N, 4]: sides S·√(1−λ), centre uniform, cut off at the image's edge."""
    half = size * np.sqrt(1 - lam) / 2
    centre = rng.uniform(0, size, (2, len(lam)))
    low = np.rint(np.clip(centre - half, 0, size))
    high = np.rint(np.clip(centre + half, 0, size))
    extent = np.where((high > low).all(axis=0), high - low, 0)
    low = np.where(extent > 0, low, 0)
    return np.stack([*low, *extent], axis=1)


def render_views(
    images: Tensor,
    views: EpochViews,
    image_ids: NDArray[np.int64],
    data: DataSpec,
    device: torch.device | None = None,
) -> Tensor:
    """Pixels of some views.

    Only indexing and elementwise arithmetic in a fixed order: the result of an image has the same bits
    whatever else is in the batch, on CPUs and GPUs.

    Args:
        images: uint8 [N, C, S, S] of all images, on any device.
        views: of the epoch.
        image_ids: int64 [B], which images.
        data: normalisation.
        device: where to compute; those of the batch alone are moved there. None: where ``images`` are.

    Returns:
        Normalised float32 [B, C, S, S] on ``device``.
    """
    device = device or images.device
    own = _crop_and_flip(images, views, image_ids, device)
    partner = views.partner[image_ids]
    if np.any(partner != image_ids):
        share = _own_share(views, image_ids, images.shape[-1], device)
        own = own * share + _crop_and_flip(images, views, partner, device) * (1 - share)
    return data.normalise(own)


def _crop_and_flip(images: Tensor, views: EpochViews, image_ids: NDArray[np.int64], device: torch.device) -> Tensor:
    """Un-mixed views, pixels 0 … 255 as float32 [B, C, S, S].

    Bilinear as ``interpolate(crop, S, align_corners=False)``: samples never reach outside the crop.
    """
    size = images.shape[-1]
    top, left, height, width = np.rint(views.crop[image_ids] * size).astype(np.int64).T
    flip = views.flip[image_ids][:, None]
    rows = _taps(top, height, size)
    columns = [np.where(flip, tap[:, ::-1], tap) for tap in _taps(left, width, size)]
    pixels = moved(images[moved(torch.from_numpy(image_ids), images.device)], device)
    return _interpolate(_interpolate(pixels, 2, *rows), 3, *columns)


def _taps(
    start: NDArray[np.int64], length: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """What each of ``size`` output samples reads: lower index, upper index, the upper's weight; [B, size]."""
    at = np.maximum((np.arange(size) + 0.5) * (length[:, None] / size) - 0.5, 0)
    lower = np.minimum(np.floor(at).astype(np.int64), length[:, None] - 1)
    upper = np.minimum(lower + 1, length[:, None] - 1)
    return start[:, None] + lower, start[:, None] + upper, (at - lower).astype(np.float32)


def _interpolate(x: Tensor, axis: int, lower: NDArray, upper: NDArray, weight: NDArray) -> Tensor:
    """(1 − weight) · x[lower] + weight · x[upper] along ``axis`` (2 or 3), for each image its own taps."""
    shape = [len(x), 1, 1, 1]
    shape[axis] = lower.shape[1]
    low, high, w = (
        moved(torch.from_numpy(np.ascontiguousarray(a)), x.device).view(shape) for a in (lower, upper, weight)
    )
    a = x.gather(axis, low.expand(x.shape)).to(torch.float32)
    b = x.gather(axis, high.expand(x.shape)).to(torch.float32)
    # Not torch.lerp, whose kernels fuse and round differently by device and by place in the batch.
    return a * (1 - w) + b * w


def _own_share(views: EpochViews, image_ids: NDArray[np.int64], size: int, device: torch.device) -> Tensor:
    """Weight of the own view at every pixel, [B, 1, S, S]: 0 inside a CutMix box and 1 outside, else λ."""
    box = views.box[image_ids]
    edges = moved(torch.from_numpy(np.ascontiguousarray(np.rint(box * size).T)), device)
    outside = moved(torch.from_numpy(np.where(box[:, 2] > 0, np.float32(1), views.lam[image_ids])), device)
    top, left, height, width = edges[:, :, None]
    at = torch.arange(size, device=device)
    inside_y, inside_x = (at >= top) & (at < top + height), (at >= left) & (at < left + width)
    inside = inside_y[:, None, :, None] & inside_x[:, None, None, :]
    return torch.where(inside, 0.0, outside[:, None, None, None])
