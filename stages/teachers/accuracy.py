"""How often a teacher is right on real images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.shards import Dataset
from stages.teachers.build import memory_format
from stages.teachers.pixels import read_pixels, spread
from stages.teachers.teacher import Teacher


@dataclass(frozen=True)
class Accuracy:
    """Top-1 of a teacher.

    Attributes:
        top1: fraction right when the choice is among the data's classes.
        top1_all: fraction right among all outputs of the network.
        images: how many were looked at.
    """

    top1: float
    top1_all: float
    images: int


def guesses(top1: float, images: int, num_classes: int) -> bool:
    """Whether an accuracy cannot be told from chance: it is less than two standard errors above it."""
    chance = 1 / num_classes
    return top1 <= chance + 2 * math.sqrt(chance * (1 - chance) / images)


def count_right(
    teacher: Teacher, pixels: Tensor, labels: Tensor, device: torch.device, batch: int = 250
) -> tuple[int, int]:
    """Images whose class comes out on top, among the data's classes and among all outputs.

    Args:
        teacher: on ``device``.
        pixels: uint8 [N, C, S, S].
        labels: int64 [N].
        device: of the forward passes.
        batch: images of one pass.
    """
    right = right_all = 0
    layout = memory_format(teacher.network)
    for start in range(0, len(labels), batch):
        x = teacher.data.normalise(pixels[start : start + batch].to(device)).contiguous(memory_format=layout)
        wanted = labels[start : start + batch].to(device)
        with torch.inference_mode():
            logits = teacher.forward_full(x)
        right += int((teacher.select(logits).argmax(1) == wanted).sum())
        right_all += int((logits.argmax(1) == teacher.index[wanted]).sum())
    return right, right_all


def top1(teacher: Teacher, dataset: Dataset, device: str | torch.device = "cpu", limit: int | None = None) -> Accuracy:
    """Accuracy on a dataset of image shards.

    Args:
        teacher: on ``device``.
        dataset: real images with the teacher's data's classes.
        device: of the forward passes.
        limit: look at so many images, evenly spread; None: all.
    """
    parts = (read_pixels(dataset, shard, teacher.data, rows) for shard, rows in spread(dataset, limit))
    return top1_of(teacher, parts, device)


def top1_of(teacher: Teacher, parts: Iterable[tuple[Tensor, Tensor]], device: str | torch.device = "cpu") -> Accuracy:
    """Accuracy on decoded images, given as (uint8 [N, C, S, S], labels [N]) parts."""
    right = right_all = images = 0
    for pixels, labels in parts:
        found = count_right(teacher, pixels, labels, torch.device(device))
        right, right_all, images = right + found[0], right_all + found[1], images + len(labels)
    return Accuracy(right / images, right_all / images, images)
