"""RandomResizedCrop boxes, drawn alike for recovery and for views."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CROP_TRIES = 10
CROP_RATIO = (3 / 4, 4 / 3)


def draw_crops(rng: np.random.Generator, count: int, size: int, min_scale: float) -> NDArray[np.int64]:
    """Boxes (top, left, height, width) of square images in pixels, int64 [count, 4].

    As torchvision's RandomResizedCrop: area uniform in [min_scale, 1] of the image, aspect ratio log-uniform in
    [3/4, 4/3], at most ten tries for a box that fits, else the whole image; place uniform.
    """
    shape = (CROP_TRIES, count)
    area = rng.uniform(min_scale, 1, shape) * size**2
    ratio = np.exp(rng.uniform(np.log(CROP_RATIO[0]), np.log(CROP_RATIO[1]), shape))
    place = rng.random((2, count))
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= size) & (height > 0) & (height <= size)
    first, image = fits.argmax(axis=0), np.arange(count)
    # A least area of 1 means no crop; nearly square boxes would still fit by rounding.
    cropped = fits.any(axis=0) & (min_scale < 1)
    height = np.where(cropped, height[first, image], size)
    width = np.where(cropped, width[first, image], size)
    top, left = np.floor(place[0] * (size - height + 1)), np.floor(place[1] * (size - width + 1))
    return np.stack([top, left, height, width], axis=1).astype(np.int64)
