"""Crop boxes against torchvision's own draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from stages.crops import draw_crops


@pytest.mark.parametrize(("size", "min_scale"), [(32, 0.08), (224, 0.08), (64, 0.7)])
def test_same_law_as_torchvision(size: int, min_scale: float) -> None:
    count = 6000
    ours = draw_crops(np.random.default_rng(0), count, size, min_scale)
    image = torch.zeros(1, size, size)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, [min_scale, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])

    def marginals(boxes: np.ndarray) -> list[np.ndarray]:
        top, left, height, width = boxes.T.astype(float)
        return [top, left, height, width, height * width, width / height, top + height, left + width]

    for a, b in zip(marginals(ours), marginals(theirs), strict=True):
        grid = np.unique(np.concatenate([a, b]))
        gap = np.abs(np.searchsorted(np.sort(a), grid, "right") - np.searchsorted(np.sort(b), grid, "right")).max()
        # Two-sample Kolmogorov–Smirnov distance; 2.2·√(2/n) is exceeded by chance once in 8,000 times.
        assert gap / count < 2.2 * (2 / count) ** 0.5


def test_boxes_lie_inside_and_keep_the_limits() -> None:
    boxes = draw_crops(np.random.default_rng(1), 20_000, 48, 0.25)
    top, left, height, width = boxes.T
    assert boxes.dtype == np.int64
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (top + height <= 48).all()
    assert (left + width <= 48).all()
    # Rounding each side moves the area by at most half a pixel a side.
    assert (height * width).min() >= 0.25 * 48**2 - 48
    ratio = width / height
    assert ratio.min() > 0.7
    assert ratio.max() < 1.43


def test_scale_one_is_the_whole_image() -> None:
    assert (draw_crops(np.random.default_rng(2), 1000, 224, 1.0) == [0, 0, 224, 224]).all()
