"""Where in a dataset the images of each class lie, for millions of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cluster.rng import generator


class ClassIndex:
    """Images of every class, in the data's order.

    About 16 bytes an image, and a second for 14 million.

    Args:
        labels: of every shard, in row order.
        num_classes: of the data; every label is below.
    """

    def __init__(self, labels: Sequence[ArrayLike], num_classes: int):
        columns = [np.asarray(column, dtype=np.int64) for column in labels]
        flat = np.concatenate([np.zeros(0, np.int64), *columns])
        self._first_row = np.cumsum([0, *map(len, columns)])
        self._by_class: NDArray[np.int64] = np.argsort(flat, kind="stable")
        self._start = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=num_classes))])

    def count(self, label: int) -> int:
        """Images of a class."""
        return int(self._start[label + 1] - self._start[label])

    def locate(self, label: int, index: int) -> tuple[int, int]:
        """(shard, row) of a class's image ``index``, counted in the data's order.

        Raises:
            IndexError: the class has fewer images.
        """
        if not 0 <= index < self.count(label):
            raise IndexError(f"class {label} has {self.count(label)} images, no image {index}")
        row = int(self._by_class[self._start[label] + index])
        shard = int(np.searchsorted(self._first_row, row, side="right")) - 1
        return shard, row - int(self._first_row[shard])

    def draw(self, label: int, number: int, seed: int, purpose: str) -> list[tuple[int, int]]:
        """(shard, row) of ``number`` different images of a class, in drawn order.

        A function of (seed, purpose, label) and the images of the class in the data's order, however that is cut into
        shards.

        Raises:
            ValueError: the class has fewer images.
        """
        picks = generator(seed, purpose, label).choice(self.count(label), number, replace=False)
        return [self.locate(label, int(index)) for index in picks]
