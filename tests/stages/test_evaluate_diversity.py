"""Cosine similarity within classes against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cluster.errors import UserError
from stages.data import DataSpec
from stages.evaluate.diversity import class_cosine, classifier_of, features
from stages.imageset import ImageSet

DATA = DataSpec(8, 1, (0.2,), (0.3,), ("a", "b", "c"))


def by_loops(values: np.ndarray, labels: np.ndarray, classes: int) -> tuple[float, float, list[float]]:
    every, per_class = [], []
    for label in range(classes):
        members = [v for v, own in zip(values, labels, strict=True) if own == label]
        found = []
        for i in range(len(members)):
            for j in range(i + 1, len(members)):
                dot = sum(a * b for a, b in zip(members[i], members[j], strict=True))
                norms = [math.sqrt(sum(a * a for a in m)) for m in (members[i], members[j])]
                found.append(dot / (norms[0] * norms[1]))
        every += found
        per_class.append(sum(found) / len(found))
    mean = sum(every) / len(every)
    return mean, math.sqrt(sum((e - mean) ** 2 for e in every) / len(every)), per_class


def test_cosine_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    values, labels = rng.normal(0.4, 1, (23, 6)), np.array([0] * 9 + [2] * 4 + [1] * 10)
    found = class_cosine(values.__getitem__, labels)
    mean, std, per_class = by_loops(values, labels, 3)
    assert found["cosine_mean"] == pytest.approx(mean, rel=1e-12)
    assert found["cosine_std"] == pytest.approx(std, rel=1e-12)
    assert found["per_class"] == pytest.approx(per_class, rel=1e-12)


def test_equal_images_are_alike_and_single_ones_have_no_pair() -> None:
    found = class_cosine(np.ones((3, 4)).__getitem__, np.array([0, 0, 2]))
    assert (found["cosine_mean"], found["cosine_std"]) == pytest.approx((1, 0))
    assert found["per_class"] == [pytest.approx(1), None, None]
    assert class_cosine(np.ones((2, 4)).__getitem__, np.array([0, 1]))["cosine_mean"] is None


class Wrapped(nn.Module):
    """Stands for a Teacher: features are read from its ``network``."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def test_features_are_the_classifiers_input_whatever_the_batch() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher = Wrapped(nn.Sequential(body, nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))).eval()
    pixels = torch.randint(0, 256, (11, 1, 8, 8), dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(11) % 3)
    found = features(teacher, images, DATA, batch=4)
    with torch.no_grad():
        x = (pixels.float() / 255 - 0.2) / 0.3
        expected = torch.relu(teacher.network[1](body(x))).double().numpy()
    assert found.dtype == np.float64
    assert features(teacher, images, DATA, np.array([7, 2])) == pytest.approx(expected[[7, 2]], abs=1e-6)
    assert found == pytest.approx(expected, abs=1e-6)
    assert not teacher.network[3]._forward_pre_hooks


def test_convolutional_classifiers_are_averaged_over_positions() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    assert classifier_of(network) is network[1]
    pixels = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    found = features(Wrapped(network), ImageSet(pixels, torch.zeros(4, dtype=torch.long)), DATA)
    assert found.shape == (4, 6)
    with pytest.raises(UserError, match="no Linear layer"):
        classifier_of(nn.Sequential(nn.Conv2d(1, 3, 3)))
