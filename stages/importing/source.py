"""What every format of labelled images is turned into before it is imported."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from fsspec.implementations.local import LocalFileSystem

from cluster import storage
from cluster.errors import PrismError, UserError, some

Format = Literal["imagefolder", "cifar", "idx", "parquet"]

# Folder and file names that mean a split, in any case; the first name found is the one imported as "val".
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "test")

# Reads the images that keys stand for: encoded bytes, or the exception that says why there are none.
Reader = Callable[[list[str]], list[bytes | Exception]]

# Deep enough for SRC/split/class/images/file; a limit because links may form circles.
MAX_DEPTH = 5


@dataclass(frozen=True)
class Split:
    """One split of a source.

    Attributes:
        name: ``train`` or ``val``.
        keys: one image each, relative to the source; sorted by class where that costs nothing, then in the source's
            own order (that of the names for files).
        labels: of ``keys``, positions in the class names.
    """

    name: str
    keys: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Source:
    """A place with labelled images.

    Attributes:
        uri: the folder.
        format: how it is read.
        class_names: in label order, the same for all splits.
        splits: ``train`` first.
        digest: sha256 over names, labels and sizes; says whether two imports are of the same data.
        ignored: files that are no part of the data (other suffixes, other folders).
    """

    uri: str
    format: Format
    class_names: list[str]
    splits: list[Split]
    digest: str
    ignored: int = 0


def find_split(names: Iterable[str], found: Iterable[str]) -> str | None:
    """The one of ``found`` that is the first of ``names``, in upper or lower case."""
    by_name = {each.lower(): each for each in sorted(found, reverse=True)}
    return next((by_name[name] for name in names if name in by_name), None)


def by_class(name: str, keys: list[str], labels: list[int]) -> Split:
    """A split whose images are grouped by class; within a class the given order stays."""
    order = sorted(range(len(keys)), key=labels.__getitem__)
    return Split(name, [keys[i] for i in order], [labels[i] for i in order])


def make_source(
    uri: str,
    format: Format,
    class_names: list[str],
    splits: list[Split],
    sizes: dict[str, int],
    ignored: int = 0,
) -> Source:
    """A checked source; ``sizes`` are those of the files behind it, relative name → bytes.

    Raises:
        UserError: no training split, or a split that lacks one of the classes.
    """
    if not splits or splits[0].name != "train" or not splits[0].keys:
        raise UserError(f"SRC: {uri} holds no training images ({format}); a split `train` is needed")
    if len(class_names) < 2:
        raise UserError(
            f"SRC: {uri} holds a single class ({class_names[0]}); give the folder whose folders are "
            "the classes, or hold train and val"
        )
    if len(set(class_names)) < len(class_names):
        raise UserError(f"SRC: {uri} names a class twice ({some(sorted(class_names))}); make the class names unique")
    for split in splits:
        missing = [class_names[i] for i in sorted(set(range(len(class_names))) - set(split.labels))]
        if missing:
            raise UserError(
                f"SRC: the {split.name} split of {uri} has no images of {len(missing)} of {len(class_names)} "
                f"classes ({some(missing)}); add them, or remove those classes or the split"
            )
    digest = hashlib.sha256(
        json.dumps([format, class_names, [[s.name, s.keys, s.labels] for s in splits], sorted(sizes.items())]).encode()
    ).hexdigest()
    return Source(uri, format, class_names, splits, digest, ignored)


def list_tree(uri: str) -> dict[str, int]:
    """Files below a folder, relative name → bytes, sorted; hidden files and folders are left out.

    Links are followed.

    Raises:
        UserError: the folder is missing, is a file, or cannot be listed.
    """
    fs, root = storage.resolve(uri)
    fs.invalidate_cache()
    files: dict[str, int] = {}
    try:
        if isinstance(fs, LocalFileSystem):
            if not os.path.exists(root):
                raise UserError(f"SRC: {uri} does not exist; give the folder that holds the images")
            if not os.path.isdir(root):
                raise UserError(f"SRC: {uri} is a file; unpack it and give the folder that holds the images")
            _walk(root, "", files, MAX_DEPTH)
        else:
            try:
                found = fs.find(root, detail=True)
            except PrismError as error:
                raise type(error)(f"SRC: {error}") from None
            for path, info in found.items():
                name = path[len(root.rstrip("/")) + 1 :]
                if name and not any(part.startswith(".") for part in name.split("/")):
                    files[name] = int(info["size"] or 0)
            if not files:
                raise UserError(f"SRC: there are no files below {uri}; check the bucket and the prefix")
    except OSError as error:
        raise UserError(f"SRC: {uri} cannot be read ({error.strerror or error}); check its name and rights") from None
    return dict(sorted(files.items()))


def _walk(folder: str, prefix: str, files: dict[str, int], depth: int) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if depth:
                    _walk(entry.path, f"{prefix}{entry.name}/", files, depth - 1)
            else:
                # A link without target is listed too: reading it fails, and that is then reported by name.
                files[prefix + entry.name] = entry.stat(follow_symlinks=entry.is_file()).st_size


def read_file(uri: str, name: str) -> bytes:
    """A file of the source that has to be whole.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return storage.read_bytes(storage.join(uri, name))
    except OSError as error:
        raise UserError(f"SRC: {posixpath.join(uri, name)} cannot be read ({error.strerror or error})") from None
