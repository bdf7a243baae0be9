"""The distilled images (or a baseline's) as one array, keyed by image id."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster import shards, storage
from cluster.errors import RunError
from stages.data import DataSpec
from stages.images import to_pixels


@dataclass(frozen=True)
class ImageSet:
    """Images of a folder of recovered shards.

    Attributes:
        images: uint8 [N, C, S, S]; row k is the image with ``image_id`` k = ipc · classes + class.
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """N."""
        return len(self.labels)


def load_image_set(uri: str, data: DataSpec) -> ImageSet:
    """Read every shard of a folder; the order of files and rows does not matter.

    Raises:
        RunError: image ids are not exactly 0 … N−1.
    """
    files = [storage.join(uri, name) for name in storage.list_files(uri, ".parquet")]
    ids = [i for file in files for i in shards.read_shard(file, ["image_id"])["image_id"].to_pylist()]
    if sorted(ids) != list(range(len(ids))) or not ids:
        raise RunError(f"{uri}: images are missing or doubled ({len(ids)} found); run the recover stage again")
    # Filled in place: a large set fits the memory once, not several times.
    images = np.empty((len(ids), data.channels, data.image_size, data.image_size), np.uint8)
    labels = np.empty(len(ids), np.int64)
    for file in files:
        table = shards.read_shard(file, ["image", "label", "image_id"])
        for image, label, index in zip(table["image"], table["label"], table["image_id"], strict=True):
            images[index.as_py()] = to_pixels(image["bytes"].as_py(), data.image_size, data.channels)
            labels[index.as_py()] = label.as_py()
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels))
