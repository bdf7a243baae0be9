"""Crop, flip and shift against slow loops and against torchvision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from numpy.typing import NDArray

from stages.recover.augment import Augmentation, augment, draw_augmentation
from stages.recover.options import Crop, RecoverOptions

PUBLISHED = RecoverOptions(roll=32)
PER_IMAGE = RecoverOptions(roll=5, batch_augment="image")


def loop_reference(image: NDArray[np.float64], crop: list[int], flip: bool, dy: int, dx: int) -> NDArray[np.float64]:
    """One image [C, S, S], pixel by pixel: bilinear resize of the crop, mirror, circular shift."""
    top, left, height, width = crop
    size = image.shape[-1]
    out = np.zeros_like(image)
    for y in range(size):
        for x in range(size):
            sy = min(max((y + 0.5) * height / size - 0.5, 0), height - 1)
            sx = min(max((x + 0.5) * width / size - 0.5, 0), width - 1)
            y0, x0 = math.floor(sy), math.floor(sx)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            wy, wx = sy - y0, sx - x0
            value = (
                (1 - wy) * (1 - wx) * image[:, top + y0, left + x0]
                + (1 - wy) * wx * image[:, top + y0, left + x1]
                + wy * (1 - wx) * image[:, top + y1, left + x0]
                + wy * wx * image[:, top + y1, left + x1]
            )
            mirrored = size - 1 - x if flip else x
            out[:, (y + dy) % size, (mirrored + dx) % size] = value
    return out


@pytest.mark.parametrize("options", [PUBLISHED, PER_IMAGE], ids=["batch", "image"])
@pytest.mark.parametrize("step", range(6))
def test_equals_the_loops(options: RecoverOptions, step: int) -> None:
    images = np.random.default_rng(step).standard_normal((3, 2, 11, 11))
    drawn = draw_augmentation(7, step, 3, 11, options)
    got = augment(torch.from_numpy(images), drawn).numpy()
    rows = len(drawn.crop)
    assert rows == (1 if options is PUBLISHED else 3)
    for i, image in enumerate(images):
        row = i % rows
        expected = loop_reference(image, drawn.crop[row].tolist(), bool(drawn.flip[row]), *drawn.shift[row].tolist())
        np.testing.assert_allclose(got[i], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("size", [32, 57])
def test_equals_torchvision(step: int, size: int) -> None:
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(step))
    drawn = draw_augmentation(1, step, 4, size, PUBLISHED)
    top, left, height, width = drawn.crop[0].tolist()
    for antialias in (True, False):
        expected = TF.resized_crop(x, top, left, height, width, [size, size], antialias=antialias)
        expected = TF.hflip(expected) if drawn.flip[0] else expected
        expected = torch.roll(expected, tuple(drawn.shift[0].tolist()), (2, 3))
        torch.testing.assert_close(augment(x, drawn), expected, rtol=0, atol=2e-5)


def test_gradient_is_that_of_torchvision() -> None:
    drawn = draw_augmentation(3, 1, 2, 16, PUBLISHED)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    (ours,) = torch.autograd.grad((augment(x, drawn) * weight).sum(), x)
    y = TF.resized_crop(x, *drawn.crop[0].tolist(), [16, 16], antialias=False)
    y = TF.hflip(y) if drawn.flip[0] else y
    y = torch.roll(y, tuple(drawn.shift[0].tolist()), (2, 3))
    (theirs,) = torch.autograd.grad((y * weight).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_everything_off_changes_no_bit() -> None:
    off = RecoverOptions(crop=Crop(min_scale=1.0), flip=False, roll=0)
    x = torch.randn(2, 3, 32, 32)
    for step in range(20):
        assert torch.equal(augment(x, draw_augmentation(1, step, 2, 32, off)), x)


def test_flip_comes_before_the_shift() -> None:
    x = torch.arange(5.0).expand(1, 1, 5, 5)
    drawn = Augmentation(np.array([[0, 0, 5, 5]]), np.array([True]), np.array([[0, 1]]))
    assert augment(x, drawn)[0, 0, 0].tolist() == [0, 4, 3, 2, 1]


def test_draws_depend_on_seed_and_step_alone() -> None:
    def values(seed: int, step: int) -> list[int]:
        drawn = draw_augmentation(seed, step, 4, 32, PER_IMAGE)
        return [*drawn.crop.flatten().tolist(), *drawn.flip.tolist(), *drawn.shift.flatten().tolist()]

    first = values(1, 9)
    values(1, 3)
    assert values(1, 9) == first
    assert values(1, 10) != first
    assert values(2, 9) != first


def test_law_of_flip_and_shift() -> None:
    drawn = [draw_augmentation(1, t, 1, 32, RecoverOptions(roll=4)) for t in range(4000)]
    flips = np.mean([d.flip[0] for d in drawn])
    assert abs(flips - 0.5) < 4 * 0.5 / 4000**0.5
    shifts = np.stack([d.shift[0] for d in drawn])
    counts = np.zeros((5, 5))
    np.add.at(counts, (shifts[:, 0], shifts[:, 1]), 1)
    assert shifts.min() == 0
    assert shifts.max() == 4
    assert np.abs(counts - 160).max() < 5 * 160**0.5
    assert not any(draw_augmentation(1, t, 1, 32, RecoverOptions(flip=False)).flip[0] for t in range(64))
