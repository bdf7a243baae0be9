"""Real images for training: kept decoded where they fit, else streamed through a shuffled window.

The order is a function of (seed, epoch, number of workers, rank) and of the dataset, not of memory or time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.rng import generator
from cluster.shards import Dataset
from stages.data import DataSpec
from stages.teachers.pixels import read_pixels

# Decoded bytes that one worker keeps. A constant, because the order of streamed images depends on it and must
# not change with the machine.
BUDGET = 2 * 2**30

Pixels = tuple[Tensor, Tensor]
"""uint8 [N, C, S, S] and labels int64 [N]."""


class RealImages:
    """The images of a dataset, decoded to the data's size.

    Args:
        dataset: image shards.
        data: size and channels.
        budget: decoded bytes to keep; larger datasets are streamed.
        rank, world: data-parallel worker and their number.
    """

    def __init__(self, dataset: Dataset, data: DataSpec, budget: int = BUDGET, rank: int = 0, world: int = 1):
        self.dataset, self.data = dataset, data
        self.rank, self.world = rank, world
        self._window = max(1, budget // data.image_bytes)
        self.resident = dataset.num_images <= self._window

    @cached_property
    def _all(self) -> Pixels:
        return _concat([read_pixels(self.dataset, k, self.data) for k in range(len(self.dataset.shards))])

    def parts(self) -> Iterator[Pixels]:
        """All images in the order of the shards, a part at a time; with several workers this one's share."""
        if self.resident:
            pixels, labels = self._all
            yield pixels[self.rank :: self.world], labels[self.rank :: self.world]
        else:
            for shard in range(self.rank, len(self.dataset.shards), self.world):
                yield read_pixels(self.dataset, shard, self.data)

    def num_batches(self, batch: int, seed: int, epoch: int) -> int:
        """Batches of an epoch, the same on every worker.

        An incomplete last batch is left out (BatchNorm would see few images), unless there is no other.
        """
        share = max(1, batch // self.world)
        if self.resident:
            return max(1, self.dataset.num_images // (share * self.world))
        return max(1, min(sum(rows) for rows in self._shares(seed, epoch)) // share)

    def batches(self, batch: int, seed: int, epoch: int) -> Iterator[Pixels]:
        """This worker's share (``batch`` / world) of every batch of an epoch, shuffled.

        Args:
            batch: images of a batch over all workers.
            seed: of the order.
            epoch: of the order.
        """
        share = max(1, batch // self.world)
        count = self.num_batches(batch, seed, epoch)
        windows = self._resident_window(seed, epoch) if self.resident else self._streamed(seed, epoch)
        rest: list[Pixels] = []
        waiting = 0
        for (pixels, labels), order in windows:
            start = 0
            while count and start < len(order):
                take = order[start : start + share - waiting]
                rest.append((pixels[take], labels[take]))
                start, waiting = start + len(take), waiting + len(take)
                if waiting == share:
                    yield _concat(rest)
                    rest, waiting, count = [], 0, count - 1
        if count and rest:
            yield _concat(rest)

    def _resident_window(self, seed: int, epoch: int) -> Iterator[tuple[Pixels, Tensor]]:
        """All images once; the workers' shares of the common order are interleaved."""
        order = generator(seed, "squeeze-order", epoch).permutation(self.dataset.num_images)
        yield self._all, torch.from_numpy(order[self.rank :: self.world].copy())

    def _order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return generator(seed, "squeeze-shards", epoch).permutation(len(self.dataset.shards))

    def _shares(self, seed: int, epoch: int) -> list[list[int]]:
        """Rows of the shards that each worker reads."""
        order = self._order(seed, epoch)
        return [[self.dataset.shards[k][1] for k in order[rank :: self.world]] for rank in range(self.world)]

    def _streamed(self, seed: int, epoch: int) -> Iterator[tuple[Pixels, Tensor]]:
        """Windows of whole shards that fill half the budget, each in a drawn order; the next is read meanwhile."""
        mine = [int(k) for k in self._order(seed, epoch)[self.rank :: self.world]]
        windows: list[list[int]] = []
        room = 0
        for shard in mine:
            rows = self.dataset.shards[shard][1]
            if rows > room:
                windows.append([])
                room = max(self._window // 2, rows)
            windows[-1].append(shard)
            room -= rows

        def read(window: list[int]) -> Pixels:
            return _concat([read_pixels(self.dataset, shard, self.data) for shard in window])

        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(read, windows[0]) if windows else None
            for index in range(len(windows)):
                assert following is not None
                pixels = following.result()
                if index + 1 < len(windows):
                    following = pool.submit(read, windows[index + 1])
                order = generator(seed, "squeeze-window", epoch, self.rank, index).permutation(len(pixels[1]))
                yield pixels, torch.from_numpy(order)


def _concat(parts: list[Pixels]) -> Pixels:
    return parts[0] if len(parts) == 1 else (torch.cat([p for p, _ in parts]), torch.cat([q for _, q in parts]))
