"""CIFAR-10 and CIFAR-100 python batches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError
from stages.images import encode_png
from stages.importing.source import Reader, Source, by_class, make_source, read_file
from stages.importing.unpickle import read_batch

# (meta file, its key of class names, label key, files of each split); each folder as the archives unpack it.
CIFAR10 = ("batches.meta", "label_names", "labels", {"train": "data_batch_", "val": "test_batch"})
CIFAR100 = ("meta", "fine_label_names", "fine_labels", {"train": "train", "val": "test"})
FOLDERS = ("", "cifar-10-batches-py/", "cifar-100-python/")


def find(files: dict[str, int]) -> tuple[str, tuple[str, str, str, dict[str, str]]] | None:
    """(folder, variant) of the batches, None where there are none."""
    for folder in FOLDERS:
        if f"{folder}batches.meta" in files and f"{folder}data_batch_1" in files:
            return folder, CIFAR10
        if f"{folder}meta" in files and f"{folder}train" in files:
            return folder, CIFAR100
    return None


def scan(uri: str, files: dict[str, int]) -> Source:
    """Read labels and class names (order of the meta file; fine labels for CIFAR-100).

    Raises:
        UserError: a batch is missing its parts, damaged, or no plain batch.
    """
    found = find(files)
    if found is None:
        raise UserError(f"SRC: no CIFAR python batches at {uri} (batches.meta and data_batch_1, or meta and train)")
    folder, (meta, names_key, label_key, prefixes) = found
    class_names = read_batch(read_file(uri, folder + meta), folder + meta).get(names_key)
    if not isinstance(class_names, list) or not all(isinstance(n, str) for n in class_names):
        raise UserError(f"SRC: {folder}{meta} of {uri} holds no {names_key}; download it again")
    splits, used = [], {folder + meta: files[folder + meta]}
    for split, prefix in prefixes.items():
        keys: list[str] = []
        labels: list[int] = []
        for name in files:
            base = name.removeprefix(folder)
            # data_batch_1 … data_batch_5, but nothing that someone put beside them.
            if not name.startswith(folder) or (base != prefix and base.rstrip("0123456789") != prefix):
                continue
            batch = _batch(uri, name)
            found_labels = batch.get(label_key)
            if not isinstance(found_labels, list) or len(found_labels) != len(batch["data"]):
                raise UserError(f"SRC: {name} of {uri} has no {label_key} for each image; download it again")
            if not all(isinstance(y, int) and 0 <= y < len(class_names) for y in found_labels):
                raise UserError(f"SRC: {name} of {uri} has labels outside the {len(class_names)} classes of {meta}")
            keys += [f"{name}/{row:05d}" for row in range(len(found_labels))]
            labels += found_labels
            used[name] = files[name]
        if keys:
            splits.append(by_class(split, keys, labels))
    return make_source(uri, "cifar", class_names, splits, used, ignored=len(files) - len(used))


def _batch(uri: str, name: str) -> dict[str, Any]:
    batch = read_batch(read_file(uri, name), name)
    data = batch.get("data")
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
        raise UserError(f"SRC: {name} of {uri} holds no images of 3×32×32 bytes; download it again")
    return batch


def make_reader(uri: str) -> Reader:
    """Reads images as PNG; batches stay open, since a class is spread over all of them."""
    cache: dict[str, NDArray[np.uint8]] = {}

    def read(keys: list[str]) -> list[bytes | Exception]:
        out: list[bytes | Exception] = []
        for key in keys:
            name, _, row = key.rpartition("/")
            if name not in cache:
                cache[name] = _batch(uri, name)["data"].reshape(-1, 3, 32, 32)
            out.append(encode_png(cache[name][int(row)]))
        return out

    return read
