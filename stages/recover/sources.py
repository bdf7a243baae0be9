"""Reading single rows out of image shards: the initial real images of a unit."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cluster import storage
from cluster.errors import RunError
from cluster.shards import Dataset, row_group_ends
from stages.data import DataSpec
from stages.images import to_pixels

# Encoded images kept per actor. Units of one chunk follow each other through the same shards, and small
# datasets fit as a whole.
CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class SourceImages:
    """Real images on their way into recovery.

    Attributes:
        pixels: uint8 [n, C, S, S], shorter side resized and centre cropped.
        names: where each came from: its path in the data, else ``shard:row``.
    """

    pixels: Tensor
    names: list[str]


class SourceReader:
    """Reads rows by (shard index, row), keeping the row groups used last.

    Args:
        dataset: the real data.
        data: size and channels of the result.
    """

    def __init__(self, dataset: Dataset, data: DataSpec):
        self._dataset, self._data = dataset, data
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._ends: dict[int, list[int]] = {}

    def read(self, sources: Sequence[tuple[int, int]], labels: Sequence[int]) -> SourceImages:
        """The images of ``sources``, whose labels must be ``labels``.

        Raises:
            RunError: a row is missing, has another label or is no readable image.
        """
        # Shard by shard, so that a cache smaller than what a unit touches reads every row group once.
        found: dict[tuple[int, int], tuple[np.ndarray, str]] = {}
        for source, label in sorted(zip(sources, labels, strict=True)):
            found[source] = self._read_one(*source, label)
        return SourceImages(
            pixels=torch.from_numpy(np.stack([found[s][0] for s in sources])),
            names=[found[s][1] for s in sources],
        )

    def _read_one(self, shard: int, row: int, label: int) -> tuple[np.ndarray, str]:
        where = f"{self._dataset.shards[shard][0]}:{row}"
        table, row = self._row_group(shard, row)
        found = table["label"][row].as_py()
        if found != label:
            raise RunError(
                f"{self._dataset.uri}: {where} has label {found} where the plan has {label}; the data changed since "
                "the run was planned, start a new run"
            )
        image = table["image"][row].as_py()
        try:
            pixels = to_pixels(image["bytes"], self._data.image_size, self._data.channels, self._data.resize)
        except ValueError as error:
            raise RunError(
                f"{self._dataset.uri}: {where} is not a readable image ({error}); import the data again"
            ) from None
        return pixels, image["path"] or where

    def _row_group(self, shard: int, row: int) -> tuple[pa.Table, int]:
        """The row group that holds a row, and the row's place in it."""
        group = bisect.bisect_right(self._ends.get(shard, []), row)
        if (shard, group) not in self._groups:
            uri = self._dataset.shard_uri(shard)
            fs, path = storage.resolve(uri)
            try:
                # Arrow asks for the row group in one piece; a cache would read on to the end of the shard.
                with fs.open(path, "rb", cache_type="none") as stream:
                    file = pq.ParquetFile(stream, pre_buffer=True, page_checksum_verification=True)
                    self._ends[shard] = row_group_ends(file).tolist()
                    group = bisect.bisect_right(self._ends[shard], row)
                    self._groups[shard, group] = file.read_row_group(group, columns=["image", "label"])
            except (OSError, IndexError, pa.ArrowException) as error:
                raise RunError(f"{uri}: row {row} is not readable ({error}); import the data again") from None
            while len(self._groups) > 1 and sum(t.nbytes for t in self._groups.values()) > CACHE_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end((shard, group))
        return self._groups[shard, group], row - (self._ends[shard][group - 1] if group else 0)
