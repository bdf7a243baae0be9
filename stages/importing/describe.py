"""From the records of its shards to the description of a dataset."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from cluster import shards
from stages.importing.core import ShardRecord


@dataclass(frozen=True)
class WrittenShard:
    """A committed shard.

    Attributes:
        name: of its file.
        record: what it holds.
        sha256: of its images and labels.
    """

    name: str
    record: ShardRecord
    sha256: str


def describe_dataset(uri: str, class_names: list[str], written: list[WrittenShard]) -> shards.Dataset:
    """Counts, channels, size, mean and deviation of a folder of shards, without reading them.

    Args:
        uri: the folder.
        class_names: in label order.
        written: in reading order. A shard without rows (all its images were corrupt) is left out.
    """
    used = [shard for shard in written if shard.record.rows]
    records = [shard.record for shard in used]
    counts: Counter[int] = Counter()
    for record in records:
        counts.update(record.class_counts)
    channels = 1 if all(record.grey for record in records) else 3
    sizes = {size for record in records for size in record.sizes}
    mean, std = _mean_std(records)
    return shards.Dataset(
        uri=uri,
        class_names=class_names,
        channels=channels,
        image_size=sizes.pop() if len(sizes) == 1 else None,
        mean=mean[:channels],
        std=std[:channels],
        shards=[(shard.name, shard.record.rows) for shard in used],
        class_counts=[counts[label] for label in range(len(class_names))],
        fingerprint=shards.fingerprint([(shard.name, shard.sha256) for shard in used]),
    )


def _mean_std(records: list[ShardRecord]) -> tuple[list[float], list[float]]:
    """Per RGB channel, over all pixels in [0, 1]; from exact sums, hence independent of their order."""
    pixels = sum(record.pixels for record in records)
    mean, std = [], []
    for channel in range(3):
        first = sum(record.sums[channel] for record in records)
        second = sum(record.squares[channel] for record in records)
        mean.append(first / pixels / 255)
        # n·Σx² − (Σx)² in integers: no cancellation.
        std.append(math.sqrt(pixels * second - first**2) / pixels / 255)
    return mean, std
