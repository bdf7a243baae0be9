"""The distilled images (or a baseline's) as one array, keyed by image id.

The array is a file of the node's cache, decoded once per node and mapped by every actor and student there.
"""

from __future__ import annotations

import functools
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster import shards, storage
from cluster.errors import RunError, UserError
from cluster.nodecache import entry_version, node_cache
from stages.data import DataSpec
from stages.images import to_pixels
from stages.pixelfile import map_pixels, row_bytes

# Shards read and decoded at the same time; Pillow decodes outside the interpreter's lock.
THREADS = 4
# Image sets up to this size are kept on a GPU that works with them; of larger ones, batches are moved there.
DEVICE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class ImageSet:
    """Images of a folder of recovered shards.

    Attributes:
        images: uint8 [N, C, S, S]; row k is the image with ``image_id`` k = ipc · classes + class. Not to be written
            to: other processes may map the same memory.
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """N."""
        return len(self.labels)

    def images_near(self, device: torch.device) -> Tensor:
        """``images`` on the device where they are small, else in the host's memory."""
        return self.images.to(device) if self.images.nbytes <= DEVICE_BYTES else self.images


def load_image_set(uri: str, data: DataSpec) -> ImageSet:
    """Open a folder's images, decoding them where the node has not done so; the order of files and rows is free.

    Raises:
        RunError: image ids are not exactly 0 … N−1.
    """
    listing = storage.list_entries(uri, ".parquet")
    files = [storage.join(uri, name) for name in listing]
    versions = {name: entry_version(entry) for name, entry in listing.items()}
    key = ["images", uri, versions, data.image_size, data.channels]

    def fill(path: Path, reserve: Callable[[int], None]) -> None:
        with path.open("wb") as file:
            _decode(uri, files, data, file.fileno(), reserve)

    path = node_cache().make(key, fill)
    if path is not None:
        with path.open("rb") as file:
            return ImageSet(*map_pixels(file.fileno(), data))
    # A file without a name: in this process's own memory where the system can do that.
    with _nameless() as own:
        _decode(uri, files, data, own.fileno(), functools.partial(_check_memory, uri))
        return ImageSet(*map_pixels(own.fileno(), data))


def _check_memory(uri: str, size: int) -> None:
    """Refuse what would end this process, and after it the next one that tries.

    Raises:
        UserError: the decoded images take more than half of the memory that is free.
    """
    try:
        fields = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()
    except (OSError, IndexError):
        return
    free = int(fields[0]) * 1024
    if size > free // 2:
        raise UserError(
            f"{uri}: its images take more than {size / 2**30:.1f} GiB decoded, which neither the node's cache on disk "
            f"nor its memory ({free / 2**30:.1f} GiB free) can hold; use machines with a larger disk, or name one by "
            "PRISM_CACHE"
        )


def _nameless() -> IO[bytes]:
    return os.fdopen(os.memfd_create("images"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()


def _decode(uri: str, files: list[str], data: DataSpec, target: int, reserve: Callable[[int], None]) -> None:
    """Write all pixels, then all labels (int64), by image id.

    Args:
        uri: for errors.
        files: shards.
        data: size and channels.
        target: file descriptor.
        reserve: told the size of the file so far.

    Raises:
        RunError: image ids are not exactly 0 … N−1.
    """
    row = data.image_bytes
    lock, rows = threading.Lock(), 0

    def decode(file: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        nonlocal rows
        table = shards.read_shard(file, ["image", "label", "image_id"])
        ids, labels = table["image_id"].to_numpy(), table["label"].to_numpy()
        if ids.min(initial=0) < 0:
            raise RunError(f"{file}: has a negative image_id; run the recover stage again")
        with lock:
            rows += len(ids)
            reserve(rows * row_bytes(data))
        for image, index in zip(table["image"], ids, strict=True):
            pixels = to_pixels(image["bytes"].as_py(), data.image_size, data.channels)
            os.pwrite(target, pixels.tobytes(), int(index) * row)
        return ids, labels

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            found = list(pool.map(decode, files))
        finally:
            # After an error the others need not be decoded.
            pool.shutdown(cancel_futures=True)
    ids = np.concatenate([i for i, _ in found]) if found else np.empty(0, np.int64)
    if not len(ids) or not np.array_equal(np.sort(ids), np.arange(len(ids))):
        raise RunError(f"{uri}: images are missing or doubled ({len(ids)} found); run the recover stage again")
    labels = np.empty(len(ids), np.int64)
    labels[ids] = np.concatenate([label for _, label in found])
    os.pwrite(target, labels.tobytes(), len(ids) * row)
