"""Which format a source has, and how each is opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from cluster import storage
from cluster.errors import UserError
from stages.importing import cifar, idx, imagefolder, parquet
from stages.importing.source import Format, Reader, Source, list_tree

_SCAN: dict[Format, Callable[[str, dict[str, int]], Source]] = {
    "cifar": cifar.scan,
    "idx": idx.scan,
    "parquet": parquet.scan,
    "imagefolder": imagefolder.scan,
}
_MATCHES: dict[Format, Callable[[dict[str, int]], bool]] = {
    "cifar": lambda files: cifar.find(files) is not None,
    "idx": idx.matches,
    "parquet": parquet.matches,
    "imagefolder": imagefolder.matches,
}
_READER: dict[Format, Callable[[str], Reader]] = {
    "cifar": cifar.make_reader,
    "idx": idx.make_reader,
    "parquet": parquet.make_reader,
    "imagefolder": imagefolder.make_reader,
}


def open_source(uri: str, format: str = "auto") -> Source:
    """List a source and its labels.

    Args:
        uri: folder, local or ``s3://``: class folders, CIFAR python batches, IDX files or Parquet.
        format: ``imagefolder``, ``cifar``, ``idx`` or ``parquet``; ``auto``: the first that fits.

    Raises:
        UserError: unknown format, nothing there, no format fits, or the data contradict themselves.
    """
    if format not in ("auto", *get_args(Format)):
        raise UserError(f"--format: {format!r} is unknown; choose auto, {', '.join(get_args(Format))}")
    # Workers may have another working directory.
    uri = storage.absolute(uri)
    files = list_tree(uri)
    if not files:
        raise UserError(f"SRC: {uri} is empty; give the folder that holds the images")
    for name, fits in _MATCHES.items():
        if format == name or (format == "auto" and fits(files)):
            return _SCAN[name](uri, files)
    raise UserError(
        f"SRC: no labelled images found at {uri}; looked for class folders with images (CLASS/*.jpg or "
        "train/CLASS/*.jpg), CIFAR python batches (batches.meta, data_batch_1; meta, train), IDX files "
        "(train-images-idx3-ubyte) and Parquet files (*.parquet)"
    )


def open_reader(format: Format, uri: str) -> Reader:
    """Reader of the images that the keys of a source stand for."""
    return _READER[format](uri)
