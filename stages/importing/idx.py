"""IDX files: MNIST, Fashion-MNIST, KMNIST, EMNIST; gzipped or not."""

from __future__ import annotations

import gzip
import math
import re
import zlib

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError
from stages.images import encode_png
from stages.importing.source import Reader, Source, by_class, make_source, read_file

IMAGES = re.compile(r"^(?:.*[/-])?(?P<split>train|t10k|test)-images[-.]idx3-ubyte(?:\.gz)?$")
UNSIGNED_BYTE = 8


def matches(files: dict[str, int]) -> bool:
    """Whether there are IDX image files."""
    return any(IMAGES.match(name) for name in files)


def scan(uri: str, files: dict[str, int]) -> Source:
    """Read the labels. Class names are the label numbers, in numeric order; ``t10k`` or ``test`` is ``val``.

    Raises:
        UserError: a labels file is missing or does not fit its images, a file is damaged, or a split is there
            twice.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    used: dict[str, int] = {}
    for name in files:
        match = IMAGES.match(name)
        if not match:
            continue
        split = "train" if match["split"] == "train" else "val"
        if split in found:
            raise UserError(f"SRC: {uri} holds two {split} files ({found[split][0]} and {name}); keep one of them")
        labels_name = next((n for n in _labels_names(name) if n in files), None)
        if labels_name is None:
            raise UserError(f"SRC: {uri} lacks the labels of {name} ({_labels_names(name)[0]}); put them beside it")
        labels = _read(uri, labels_name, dims=1)
        images = _read(uri, name, dims=3)
        if len(labels) != len(images):
            raise UserError(
                f"SRC: {name} holds {len(images)} images but {labels_name} {len(labels)} labels; get both again"
            )
        found[split] = (name, labels.tolist())
        used |= {name: files[name], labels_name: files[labels_name]}
    if "train" not in found:
        raise UserError(f"SRC: {uri} holds no IDX training images (train-images-idx3-ubyte, also .gz)")
    numbers = sorted(set(found["train"][1]))
    index = {number: label for label, number in enumerate(numbers)}
    splits = []
    for split in sorted(found):
        name, labels_found = found[split]
        unknown = sorted(set(labels_found) - set(numbers))
        if unknown:
            raise UserError(f"SRC: {name} has images of class {unknown[0]}, which the training images have not")
        keys = [f"{name}/{row:05d}" for row in range(len(labels_found))]
        splits.append(by_class(split, keys, [index[number] for number in labels_found]))
    return make_source(uri, "idx", [str(n) for n in numbers], splits, used, ignored=len(files) - len(used))


def _labels_names(images_name: str) -> list[str]:
    plain = images_name.removesuffix(".gz")
    labels = re.sub(r"-images([-.])idx3-ubyte$", r"-labels\1idx1-ubyte", plain)
    return [labels + ".gz", labels] if images_name.endswith(".gz") else [labels, labels + ".gz"]


def _read(uri: str, name: str, dims: int) -> NDArray[np.uint8]:
    """Two zero bytes, type, number of dimensions, sizes as big-endian uint32, then the values."""
    data = read_file(uri, name)
    if name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"SRC: {name} of {uri} is damaged ({error}); download it again") from None
    if data[:4] != bytes([0, 0, UNSIGNED_BYTE, dims]) or len(data) < 4 + 4 * dims:
        raise UserError(f"SRC: {name} of {uri} is no IDX file of {dims}-dimensional bytes; download it again")
    shape = [int(n) for n in np.frombuffer(data, ">u4", dims, offset=4)]
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dims)
    if len(values) != math.prod(shape):
        raise UserError(
            f"SRC: {name} of {uri} holds {len(values)} bytes where its head says {math.prod(shape)}; download it again"
        )
    return values.reshape(shape)


def make_reader(uri: str) -> Reader:
    """Reads images as grey PNG; a file stays open, since a class is spread over all of it."""
    cache: dict[str, NDArray[np.uint8]] = {}

    def read(keys: list[str]) -> list[bytes | Exception]:
        out: list[bytes | Exception] = []
        for key in keys:
            name, _, row = key.rpartition("/")
            if name not in cache:
                cache[name] = _read(uri, name, dims=3)
            out.append(encode_png(cache[name][int(row)][None]))
        return out

    return read
