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
    ids: list[int] = []
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    for name in storage.list_files(uri, ".parquet"):
        table = shards.read_shard(storage.join(uri, name), ["image", "label", "image_id"])
        ids += table["image_id"].to_pylist()
        labels += table["label"].to_pylist()
        pixels += [to_pixels(row["bytes"], data.image_size, data.channels) for row in table["image"].to_pylist()]
    order = np.argsort(ids, kind="stable")
    if not np.array_equal(np.asarray(ids)[order], np.arange(len(ids))) or not ids:
        raise RunError(f"{uri}: images are missing or doubled ({len(ids)} found); run the recover stage again")
    return ImageSet(torch.from_numpy(np.stack(pixels)[order]), torch.tensor(labels)[torch.from_numpy(order)])
