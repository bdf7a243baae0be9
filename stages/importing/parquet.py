"""Parquet in the Hugging Face image layout; also the shards that an import writes."""

from __future__ import annotations

import json
import re
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import UserError
from cluster.shards import row_group_ends
from stages.importing.source import TRAIN_NAMES, VAL_NAMES, Reader, Source, Split, find_split, make_source

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def matches(files: dict[str, int]) -> bool:
    """Whether there are Parquet files."""
    return any(name.endswith(".parquet") for name in files)


def scan(uri: str, files: dict[str, int]) -> Source:
    """Read labels and class names; the images stay where they are.

    The split of a file is the first of its folders, or the front of its name, that names one
    (``train/0000.parquet``, ``data/train-00000-of-00002.parquet``); files without any are the training split.

    Raises:
        UserError: no image or label column, labels outside the class names, or files that disagree.
    """
    parts: dict[str, list[str]] = defaultdict(list)
    for name in files:
        if name.endswith(".parquet"):
            parts[_split_name(name)].append(name)
    train = find_split(TRAIN_NAMES, parts) or ""
    val = find_split(VAL_NAMES, parts)
    class_names: list[str] | None = None
    numbers: list[int] = []
    splits, used = [], {}
    for split, group in [("train", train), *([("val", val)] if val else [])]:
        keys: list[str] = []
        labels: list[int] = []
        for name in parts.get(group, []):
            found, names = _labels(uri, name)
            if class_names is not None and names != class_names:
                raise UserError(
                    f"SRC: {name} of {uri} has other class names than the files before it; give all the same"
                )
            class_names = names
            if names and not all(y is not None and 0 <= y < len(names) for y in found):
                raise UserError(f"SRC: {name} of {uri} has labels outside its {len(names)} class names; correct them")
            keys += [f"{name}/{row:06d}" for row in range(len(found))]
            labels += found
            used[name] = files[name]
        if not class_names:
            if split == "train":
                numbers = sorted(set(labels))
            unknown = sorted(set(labels) - set(numbers))
            if unknown:
                raise UserError(f"SRC: {split} of {uri} has images of class {unknown[0]}, which train has not")
            labels = [numbers.index(y) for y in labels]
        # In the order of the source: sorted by class, every shard would read a few rows of every row group.
        splits.append(Split(split, keys, labels))
    names_or_numbers = class_names or [str(n) for n in numbers]
    return make_source(uri, "parquet", names_or_numbers, splits, used, ignored=len(files) - len(used))


def _split_name(name: str) -> str:
    *folders, base = name.split("/")
    for part in [*folders, re.split(r"[-_.]", base)[0]]:
        if part.lower() in TRAIN_NAMES + VAL_NAMES:
            return part.lower()
    return ""


def _labels(uri: str, name: str) -> tuple[list[int], list[str]]:
    """Labels of a file, and its class names (empty where the file names none)."""
    fs, path = storage.resolve(storage.join(uri, name))
    try:
        with fs.open(path, "rb") as handle:
            file = pq.ParquetFile(handle)
            schema = file.schema_arrow
            column = next((c for c in LABEL_COLUMNS if c in schema.names), None)
            image = _image_column(schema)
            if column is None or image is None:
                raise UserError(
                    f"SRC: {name} of {uri} has the columns {', '.join(schema.names)}; needed are one of "
                    f"{', '.join(IMAGE_COLUMNS)} with bytes inside and one of {', '.join(LABEL_COLUMNS)}"
                )
            if not pa.types.is_integer(schema.field(column).type):
                raise UserError(
                    f"SRC: column {column} of {name} of {uri} holds no integers; labels must be class numbers"
                )
            labels = file.read(columns=[column])[column].to_pylist()
            features = (
                json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
            )
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"SRC: {name} of {uri} is no readable Parquet file ({error}); get it again") from None
    if None in labels:
        raise UserError(f"SRC: {name} of {uri} has rows without label; remove them")
    return labels, list(features.get(column, {}).get("names") or [])


def _image_column(schema: pa.Schema) -> str | None:
    for column in IMAGE_COLUMNS:
        if column in schema.names:
            kind = schema.field(column).type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                return column
    return None


def make_reader(uri: str) -> Reader:
    """Reads encoded images, one row group at a time."""

    def read(keys: list[str]) -> list[bytes | Exception]:
        out: list[bytes | Exception] = [ValueError("not found")] * len(keys)
        wanted: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for position, key in enumerate(keys):
            name, _, row = key.rpartition("/")
            wanted[name].append((int(row), position))
        for name, rows in wanted.items():
            _read_rows(uri, name, rows, out)
        return out

    return read


def _read_rows(uri: str, name: str, rows: list[tuple[int, int]], out: list[bytes | Exception]) -> None:
    """Put the images of ``rows`` (row, position in ``out``) where they belong."""
    fs, path = storage.resolve(storage.join(uri, name))
    with fs.open(path, "rb") as handle:
        file = pq.ParquetFile(handle)
        column = _image_column(file.schema_arrow)
        ends = row_group_ends(file)
        groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for row, position in rows:
            groups[int(np.searchsorted(ends, row, side="right"))].append((row, position))
        for group, members in groups.items():
            start = int(ends[group - 1]) if group else 0
            try:
                images = file.read_row_group(group, columns=[f"{column}.bytes"])[column]
            except (OSError, pa.ArrowException) as error:
                for _, position in members:
                    out[position] = ValueError(f"its row group cannot be read ({error})")
                continue
            for row, position in members:
                data = images[row - start].as_py()
                out[position] = data["bytes"] if data and data["bytes"] else ValueError("it holds no bytes")
