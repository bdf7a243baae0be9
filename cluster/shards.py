"""The image shard format, real and distilled alike, and the dataset that a folder of shards forms.

A shard is a Parquet file with the columns ``image`` = struct<bytes: binary, path: string> and ``label`` = int64,
which is what Hugging Face ``datasets`` writes and reads. Class names stand in the schema metadata, under the
``huggingface`` key that ``datasets`` understands.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster import storage
from cluster.errors import UserError

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGE_FIELDS: list[pa.Field] = [pa.field("image", IMAGE_TYPE), pa.field("label", pa.int64())]
RECOVERED_FIELDS: list[pa.Field] = [
    *IMAGE_FIELDS,
    pa.field("image_id", pa.int64()),
    pa.field("ipc", pa.int32()),
    pa.field("source_id", pa.string()),
    pa.field("logit_teacher", pa.string()),
    pa.field("bn_teachers", pa.list_(pa.string())),
    pa.field("loss_ce", pa.float64()),
    pa.field("loss_bn", pa.list_(pa.float64())),
    pa.field("iterations", pa.int32()),
    pa.field("unit_seed", pa.int64()),
]
DATASET_FILE = "dataset.json"
# Shards read at the same time where only a part of each is wanted: waiting for an object store, not computing.
READERS = 16
# One request of an object store while a shard is read from end to end.
READ_BYTES = 32 * 2**20
DECODE_BYTES = 8 * 2**20
# Readers of single images fetch a whole row group; a shard of small images is one of them.
ROW_GROUP_BYTES = 16 * 2**20


def _hf_feature(field: pa.Field, class_names: list[str]) -> dict[str, Any]:
    if field.name == "image":
        return {"_type": "Image"}
    if field.name == "label":
        return {"names": class_names, "_type": "ClassLabel"}
    if pa.types.is_list(field.type):
        return {"feature": {"dtype": _hf_dtype(field.type.value_type), "_type": "Value"}, "_type": "List"}
    return {"dtype": _hf_dtype(field.type), "_type": "Value"}


def _hf_dtype(kind: pa.DataType) -> str:
    return {"double": "float64", "float": "float32", "halffloat": "float16"}.get(str(kind), str(kind))


def image_schema(
    class_names: list[str], fields: list[pa.Field] = IMAGE_FIELDS, metadata: dict[str, Any] | None = None
) -> pa.Schema:
    """Schema of an image shard: columns, class names (order = label), and ``metadata`` as JSON under ``prism``."""
    features = {f.name: _hf_feature(f, class_names) for f in fields}
    return pa.schema(
        fields,
        metadata={
            "huggingface": json.dumps({"info": {"features": features}}),
            "prism": json.dumps({"class_names": class_names, **(metadata or {})}, sort_keys=True),
        },
    )


def table_bytes(table: pa.Table, **parquet_options: Any) -> bytes:
    """A table as Parquet file bytes; equal tables give equal bytes."""
    sink = io.BytesIO()
    # Encoded images and fp16 logits do not compress; the small columns do not matter.
    pq.write_table(table, sink, write_page_checksum=True, **{"compression": "none", **parquet_options})
    return sink.getvalue()


def image_shard_bytes(table: pa.Table) -> bytes:
    """Real images as Parquet file bytes, in row groups of about ``ROW_GROUP_BYTES``."""
    return table_bytes(table, row_group_size=max(1, ROW_GROUP_BYTES * len(table) // max(1, table.nbytes)))


def write_shard(uri: str, table: pa.Table, **parquet_options: Any) -> int:
    """Commit a table as one shard, atomically. Returns the file's size in bytes."""
    data = table_bytes(table, **parquet_options)
    storage.write_bytes(uri, data)
    return len(data)


def read_shard(uri: str, columns: list[str] | None = None, name: str | None = None) -> pa.Table:
    """A shard as a table.

    Args:
        uri: of the shard.
        columns: to read. None: all.
        name: named in errors instead of ``uri``, which may be a copy.

    Raises:
        UserError: the file is missing, is no Parquet file or fails its checksums.
    """
    with _open_shard(uri, name or uri) as file:
        return pq.read_table(file, columns=columns, page_checksum_verification=True)


def row_group_ends(file: pq.ParquetFile) -> NDArray[np.int64]:
    """For every row group the first row behind it."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return np.cumsum(sizes, dtype=np.int64)


def read_rows(uri: str, rows: NDArray[Any]) -> pa.Table:
    """Some images of a shard with their labels, in little more memory than these and a row group take.

    Args:
        uri: of the shard.
        rows: integers, ascending; only the row groups that hold them are read.

    Raises:
        UserError: see ``read_shard``; or the shard has fewer rows.
    """
    columns = [field.name for field in IMAGE_FIELDS]
    with _open_shard(uri, uri) as stream:
        # Arrow asks for the columns of a row group in one piece.
        file = pq.ParquetFile(stream, pre_buffer=True, page_checksum_verification=True)
        starts = np.concatenate([[0], row_group_ends(file)])
        if len(rows) and rows[-1] >= starts[-1]:
            raise UserError(f"{uri}: has {starts[-1]} images, no image {rows[-1]}; import the data again")
        groups = np.searchsorted(starts, rows, side="right") - 1
        parts = [
            file.read_row_group(int(group), columns=columns).take(rows[groups == group] - starts[group])
            for group in np.unique(groups)
        ]
        return pa.concat_tables([file.schema_arrow.empty_table().select(columns), *parts])


def read_array(uri: str, column: str) -> NDArray[Any]:
    """A column of fixed-size lists as an array [rows, list size], in little more memory than the array's own.

    The file is read in large sequential pieces.

    Raises:
        UserError: see ``read_shard``.
    """
    with _open_shard(uri, uri) as stream:
        file = pq.ParquetFile(stream, buffer_size=READ_BYTES, page_checksum_verification=True)
        kind = file.schema_arrow.field(column).type
        out = np.empty((file.metadata.num_rows, kind.list_size), kind.value_type.to_pandas_dtype())
        at = 0
        # Decoded in parts: Arrow takes several times what it decodes.
        rows = max(1, DECODE_BYTES // max(1, kind.list_size * out.itemsize))
        for batch in file.iter_batches(rows, columns=[column], use_threads=False):
            out[at : at + len(batch)] = batch.column(0).flatten().to_numpy().reshape(len(batch), -1)
            at += len(batch)
    return out


@contextlib.contextmanager
def _open_shard(uri: str, name: str) -> Iterator[Any]:
    """A shard's file, and words for what is wrong with it."""
    fs, path = storage.resolve(uri)
    try:
        # Arrow asks for what it needs in pieces that are large enough; a cache would fetch more than that.
        with fs.open(path, "rb", cache_type="none") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{name}: no such shard") from None
    except (pa.ArrowException, OSError) as error:
        # Arrow reports a wrong checksum as an OSError; others are troubles of the storage, which pass.
        if isinstance(error, OSError) and "CRC" not in str(error):
            raise
        raise UserError(
            f"{name}: not a readable Parquet file ({error}); delete it and run again, or import the data again"
        ) from None


def shard_metadata(uri: str) -> dict[str, Any] | None:
    """The ``prism`` metadata of a shard with ``num_rows`` added; None where the file is no complete shard."""
    fs, path = storage.resolve(uri)
    try:
        with fs.open(path, "rb") as file:
            footer = pq.read_metadata(file)
        found = json.loads((footer.metadata or {})[b"prism"])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None
    return {**found, "num_rows": footer.num_rows}


@dataclass(frozen=True)
class Dataset:
    """A folder of real image shards with its ``dataset.json``.

    Attributes:
        uri: the folder.
        class_names: in label order.
        channels: 1 or 3.
        image_size: (height, width) where all images agree, else None.
        mean, std: per channel, of pixels scaled to [0, 1].
        shards: (file name, rows), in reading order.
        class_counts: images per class.
        fingerprint: hash of what is in the shards; of an import, over their names and content hashes.
    """

    uri: str
    class_names: list[str]
    channels: int
    image_size: tuple[int, int] | None
    mean: list[float]
    std: list[float]
    shards: list[tuple[str, int]]
    class_counts: list[int]
    fingerprint: str

    @property
    def num_images(self) -> int:
        """Images in all shards."""
        return sum(rows for _, rows in self.shards)

    def shard_uri(self, index: int) -> str:
        """URI of shard ``index``."""
        return storage.join(self.uri, self.shards[index][0])

    def shard_uris(self) -> list[str]:
        """URIs of all shards in order."""
        return [self.shard_uri(i) for i in range(len(self.shards))]


def fingerprint(hashes: list[tuple[str, str]]) -> str:
    """Fingerprint of a dataset from (shard name, sha256 of its images and labels) pairs."""
    return hashlib.sha256(json.dumps(sorted(hashes)).encode()).hexdigest()


def save_dataset(dataset: Dataset) -> None:
    """Write ``dataset.json``; it is written last, so its presence says that the import is complete."""
    value = asdict(dataset)
    del value["uri"]
    storage.write_json(storage.join(dataset.uri, DATASET_FILE), value)


def load_dataset(uri: str, field: str = "data") -> Dataset:
    """Open a folder of image shards.

    Raises:
        UserError: missing, or not the product of ``prism import``; names ``field``.
    """
    where = storage.join(uri, DATASET_FILE)
    try:
        value = storage.read_json(where)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        # `prism import` makes a folder for each split.
        folder = re.sub(r"/(train|val)/*$", "", uri)
        raise UserError(
            f"{field}: no imported dataset at {uri} ({DATASET_FILE} is missing); "
            f"make one with `prism import SRC {folder}`"
        ) from None
    except ValueError:
        raise UserError(f"{field}: {where} is not valid JSON; import the data again") from None
    try:
        return Dataset(
            uri=uri,
            **{
                **value,
                "shards": [(str(n), int(r)) for n, r in value["shards"]],
                "image_size": tuple(value["image_size"]) if value["image_size"] else None,
            },
        )
    except (KeyError, TypeError):
        raise UserError(f"{field}: {where} does not describe a dataset; import the data again") from None


def labels_of(dataset: Dataset) -> list[NDArray[np.int64]]:
    """Labels of every shard, int64 in row order (reads the label column alone, several shards at the same time)."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda uri: read_shard(uri, ["label"])["label"].to_numpy(), dataset.shard_uris()))
