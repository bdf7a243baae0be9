"""Real images out of their shards, decoded, in the order in which they lie there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
import torch
from torch import Tensor

from cluster.errors import RunError
from cluster.nodecache import node_cache
from cluster.shards import Dataset, read_shard
from cluster.version import __version__
from stages.data import DataSpec
from stages.images import to_pixels
from stages.pixelfile import map_pixels, row_bytes

# Pillow lets go of the interpreter while it decodes; more threads than this fight over it.
DECODE_THREADS = min(8, os.cpu_count() or 1)
CHUNK = 64


def decode_rows(table: pa.Table, data: DataSpec, where: str) -> tuple[Tensor, Tensor]:
    """Decode the rows of an image shard on a few threads.

    Args:
        table: columns ``image`` and ``label``.
        data: size and channels of the result.
        where: names the shard in errors.

    Returns:
        uint8 [N, C, S, S] and int64 [N].

    Raises:
        RunError: a row is no readable image.
    """
    encoded = table["image"].combine_chunks().field("bytes")
    pixels = np.empty((len(table), data.channels, data.image_size, data.image_size), np.uint8)

    def decode(start: int) -> None:
        for row in range(start, min(start + CHUNK, len(table))):
            try:
                pixels[row] = to_pixels(encoded[row].as_py(), data.image_size, data.channels, data.resize)
            except (ValueError, TypeError) as error:
                raise RunError(f"{where}: row {row} is not a readable image ({error}); import the data again") from None

    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        list(pool.map(decode, range(0, len(table), CHUNK)))
    return torch.from_numpy(pixels), torch.from_numpy(table["label"].to_numpy().astype(np.int64))


def read_pixels(
    dataset: Dataset, shard: int, data: DataSpec, rows: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """One decoded shard: uint8 [N, C, S, S] and labels int64 [N].

    Args:
        dataset: the images.
        shard: index of the shard.
        data: size and channels of the result.
        rows: the rows wanted; None: all.
    """
    uri = dataset.shard_uri(shard)
    table = read_shard(uri, ["image", "label"])
    return decode_rows(table if rows is None else table.take(list(rows)), data, uri)


def shared_pixels(dataset: Dataset, shard: int, start: int, stop: int, data: DataSpec) -> tuple[Tensor, Tensor]:
    """Rows ``start:stop`` of a shard, decoded once per node where its cache can hold them; see ``read_pixels``."""
    uri, cache = dataset.shard_uri(shard), node_cache()

    def decode() -> tuple[Tensor, Tensor]:
        local = cache.local(uri, version=dataset.fingerprint)
        table = read_shard(local, ["image", "label"], name=uri)
        if len(table) < stop:
            raise RunError(f"{uri}: has {len(table)} rows where dataset.json says more; import the data again")
        return decode_rows(table.slice(start, stop - start), data, f"{uri} from row {start}")

    def fill(path: Path, reserve: Callable[[int], None]) -> None:
        reserve((stop - start) * row_bytes(data))
        with path.open("wb") as file:
            for part in decode():
                file.write(part.numpy().data)

    what = ["pixels", dataset.fingerprint, dataset.shards[shard], start, stop]
    # And by what they are decoded.
    how = [data.image_size, data.channels, data.resize, PIL.__version__, __version__]
    # All or nothing: slices come round in turn, so of a part of them each would be dropped just before its next use.
    fits = cache.room() >= dataset.num_images * row_bytes(data)
    path = cache.make([*what, *how], fill) if fits else None
    if path is None:
        return decode()
    with path.open("rb") as file:
        return map_pixels(file.fileno(), data)


def spread(dataset: Dataset, limit: int | None) -> Iterator[tuple[int, list[int] | None]]:
    """Shards and rows of ``limit`` images spread evenly over a dataset (every class, where it is sorted by class).

    Yields:
        (shard, rows); rows None = all of them.
    """
    total = dataset.num_images
    if limit is None or limit >= total:
        yield from ((shard, None) for shard in range(len(dataset.shards)))
        return
    wanted = (np.arange(limit) * total) // limit
    start = 0
    for shard, (_, count) in enumerate(dataset.shards):
        rows = wanted[(wanted >= start) & (wanted < start + count)] - start
        start += count
        if len(rows):
            yield shard, rows.tolist()
