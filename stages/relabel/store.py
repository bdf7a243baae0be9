"""Label shards: one row per (epoch, position) with the view that the teachers saw and their combined logits.

A shard holds whole epochs, or a range of positions of one epoch where an epoch is large. Its name carries the
first epoch and position it holds, so a reader of one epoch opens that epoch's shards alone. Rows are single
images: any training batch size is a slice of positions, and a mixing partner may come from anywhere.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster import shards, storage
from cluster.errors import PrismError, RunError
from stages.data import DataSpec
from stages.relabel.unit import LabelUnit
from stages.relabel.views import EpochViews, render_views

SHARD_NAME = re.compile(r"labels-(\d+)-(\d+)\.parquet")
AGAIN = "run the relabel stage again"
VIEW_COLUMNS = ["epoch", "position", "image_id", "crop", "flip", "mix_partner", "mix_lambda", "mix_box"]
T = TypeVar("T")


def label_schema(num_classes: int, metadata: dict[str, Any]) -> pa.Schema:
    """Columns of a label shard; boxes are (top, left, height, width), relative to the image's side.

    Args:
        num_classes: length of the logits.
        metadata: plain values, kept as JSON under the schema's key ``prism``.
    """
    box = pa.list_(pa.float32(), 4)
    columns = {
        "epoch": pa.int32(),
        "position": pa.int32(),
        "batch": pa.int32(),
        "image_id": pa.int64(),
        "crop": box,
        "flip": pa.bool_(),
        "mix_partner": pa.int64(),
        "mix_lambda": pa.float32(),
        "mix_box": box,
        "logits": pa.list_(pa.float16(), num_classes),
    }
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in columns.items()],
        metadata={"prism": json.dumps(metadata, sort_keys=True)},
    )


def shard_uri(labels_uri: str, unit: LabelUnit) -> str:
    """Where a unit's shard lies."""
    return storage.join(labels_uri, f"{unit.id}.parquet")


def write_labels(
    labels_uri: str,
    unit: LabelUnit,
    views: Sequence[EpochViews],
    logits: NDArray[np.float16],
    batch: int,
    metadata: dict[str, Any],
) -> int:
    """Commit a unit's shard, atomically.

    Args:
        labels_uri: folder of the label shards.
        unit: what is labelled.
        views: of each of its epochs.
        logits: float16 [unit.num_rows, C], by epoch and position.
        batch: rows of a label batch.
        metadata: see ``label_schema``; ``num_images``, ``unit`` and ``batch`` are added.

    Returns:
        The file's size in bytes.
    """
    positions = np.arange(unit.position_start, unit.position_stop, dtype=np.int32)
    ids = [v.order[positions] for v in views]
    columns = {
        "epoch": np.repeat(np.arange(unit.epoch_start, unit.epoch_stop, dtype=np.int32), len(positions)),
        "position": np.tile(positions, len(views)),
        "batch": np.tile(positions // np.int32(batch), len(views)),
        "image_id": np.concatenate(ids),
        "crop": np.concatenate([v.crop[i] for v, i in zip(views, ids, strict=True)]),
        "flip": np.concatenate([v.flip[i] for v, i in zip(views, ids, strict=True)]),
        "mix_partner": np.concatenate([v.partner[i] for v, i in zip(views, ids, strict=True)]),
        "mix_lambda": np.concatenate([v.lam[i] for v, i in zip(views, ids, strict=True)]),
        "mix_box": np.concatenate([v.box[i] for v, i in zip(views, ids, strict=True)]),
        "logits": logits,
    }
    schema = label_schema(logits.shape[1], {**metadata, "unit": unit.id, "num_images": unit.num_images, "batch": batch})
    arrays = [_to_arrow(columns[field.name], field.type) for field in schema]
    # Floats and ids hardly repeat: a dictionary would only add to them.
    return shards.write_shard(
        shard_uri(labels_uri, unit),
        pa.Table.from_arrays(arrays, schema=schema),
        use_dictionary=["epoch", "batch"],
        write_statistics=["epoch", "position"],
    )


def _to_arrow(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind.value_type), type=kind)
    return pa.array(values, kind)


def _to_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
    return array.to_numpy(zero_copy_only=False)


class EpochLogits:
    """The logits of an epoch, float16 [N, C], indexed by positions; read shard by shard as they are asked for.

    Args:
        reader: holds the shards in use.
        shard: int32 [N], index of the shard that holds a position.
        row: int32 [N], row there.
        num_classes: C.
    """

    dtype = np.dtype(np.float16)

    def __init__(self, reader: LabelReader, shard: NDArray[np.int32], row: NDArray[np.int32], num_classes: int):
        self._reader, self._shard, self._row = reader, shard, row
        self.shape = (len(row), num_classes)

    def __len__(self) -> int:
        """N."""
        return len(self._row)

    def __getitem__(self, positions: NDArray[np.int64] | slice) -> NDArray[np.float16]:
        """Logits of some positions, in their order."""
        shard, row = self._shard[positions], self._row[positions]
        out = np.empty((len(row), self.shape[1]), np.float16)
        for index in np.unique(shard):
            here = shard == index
            out[here] = self._reader.shard_logits(int(index))[row[here]]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All of them in memory."""
        return self[:].astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class EpochLabels:
    """All labels of one epoch.

    Attributes:
        views: what the teachers saw.
        logits: float16 [N, C], by position: row p belongs to the view of image ``order[p]``.
    """

    views: EpochViews
    logits: NDArray[np.float16] | EpochLogits

    @property
    def order(self) -> NDArray[np.int64]:
        """int64 [N], position → image id."""
        return self.views.order

    def render(
        self,
        images: Tensor,
        positions: NDArray[np.int64] | slice,
        data: DataSpec,
        device: torch.device | None = None,
    ) -> Tensor:
        """The very pixels that the teachers labelled.

        Args:
            images: uint8 [N, C, S, S], rows are image ids.
            positions: which rows of the epoch, B of them.
            data: normalisation.
            device: where to compute. None: where ``images`` are.

        Returns:
            Normalised float32 [B, C, S, S] on ``device``.
        """
        return render_views(images, self.views, self.order[positions], data, device)


class LabelReader:
    """Reads a folder of label shards, epoch by epoch and within an epoch in the order of positions.

    In memory are the views of one epoch (some 60 bytes an image) and the logits of one shard; with a ``pool``, those
    that come next as well.

    Args:
        uri: folder of label shards.
        data: whose classes the labels must be of. None: any.
        pool: a thread that reads ahead. None: what is needed is read when it is needed.

    Attributes:
        metadata: what the labels were made with: ``class_names``, ``ensemble``, ``teachers``, ``identity``,
            ``num_images``, ``relabel`` (the options), ``seed``.

    Raises:
        RunError: no labels, or of other classes than ``data``'s (when given).
    """

    def __init__(self, uri: str, data: DataSpec | None = None, pool: ThreadPoolExecutor | None = None):
        self.uri = uri
        found = [
            (int(m[1]), int(m[2]), m[0]) for n in storage.list_files(uri, ".parquet") if (m := SHARD_NAME.fullmatch(n))
        ]
        # By first epoch and first position: the order in which they are read.
        self._names = [name for _, _, name in sorted(found)]
        self._starts: dict[int, list[int]] = {}
        for index, (start, _, _) in enumerate(sorted(found)):
            self._starts.setdefault(start, []).append(index)
        metadata = shards.shard_metadata(storage.join(uri, self._names[0])) if found else None
        if metadata is None:
            raise RunError(f"{uri}: no readable label shards; {AGAIN}")
        self.metadata: dict[str, Any] = metadata
        if data is not None and metadata["class_names"] != list(data.class_names):
            raise RunError(f"{uri}: the labels are of other classes, or in another order, than the data; {AGAIN}")
        self._views = _Window(self._read_views, sorted(self._starts), pool)
        self._logits = _Window(self._read_logits, list(range(len(self._names))), pool)

    def read_epoch(self, epoch: int) -> EpochLabels:
        """Labels of one epoch; reading epochs in order reads everything once.

        Raises:
            RunError: the epoch is not there as a whole, or its shards belong to different runs. Damage of the logits
                shows when they are asked for.
        """
        start = max((start for start in self._starts if start <= epoch), default=None)
        if start is None:
            raise RunError(f"{self.uri}: labels of the first epochs are missing; {AGAIN}")
        columns = self._views[start]
        rows = np.flatnonzero(columns["epoch"] == epoch)
        rows = rows[np.argsort(columns["position"][rows], kind="stable")]
        ids, total = columns["image_id"][rows], self.metadata["num_images"]
        complete = np.array_equal(columns["position"][rows], np.arange(total))
        if not complete or not np.array_equal(np.sort(ids), np.arange(total)):
            raise RunError(f"{self.uri}: labels of epoch {epoch} are incomplete ({len(rows)} of {total}); {AGAIN}")
        by_image = rows[np.argsort(ids)]
        views = EpochViews(
            crop=columns["crop"][by_image],
            flip=columns["flip"][by_image],
            partner=columns["mix_partner"][by_image],
            lam=columns["mix_lambda"][by_image],
            box=columns["mix_box"][by_image],
            order=ids,
        )
        classes = len(self.metadata["class_names"])
        return EpochLabels(views, EpochLogits(self, columns["shard"][rows], columns["row"][rows], classes))

    def shard_logits(self, index: int) -> NDArray[np.float16]:
        """Logits of the shard that is ``index``-th in reading order, by row.

        Raises:
            RunError: it is damaged.
        """
        return self._logits[index]

    def _read_views(self, start: int) -> dict[str, NDArray[Any]]:
        """All but the logits of the shards whose first epoch is ``start``; a row's place is ``shard`` and ``row``."""
        tables = []
        for index in self._starts[start]:
            uri = storage.join(self.uri, self._names[index])
            with _damage(uri):
                table = shards.read_shard(uri, VIEW_COLUMNS)
            metadata = json.loads(table.schema.metadata[b"prism"])
            if any(metadata.get(key) != self.metadata[key] for key in ("identity", "num_images", "class_names")):
                raise RunError(f"{uri}: belongs to another run than the shards beside it; {AGAIN}")
            tables.append(table.replace_schema_metadata(None))
        table = pa.concat_tables(tables)
        sizes = [len(t) for t in tables]
        return {
            **{name: _to_numpy(table[name]) for name in VIEW_COLUMNS},
            "shard": np.repeat(np.array(self._starts[start], dtype=np.int32), sizes),
            "row": np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
        }

    def _read_logits(self, index: int) -> NDArray[np.float16]:
        uri = storage.join(self.uri, self._names[index])
        with _damage(uri):
            return shards.read_array(uri, "logits")


class _Window(Generic[T]):
    """Values read by key; held are the last one asked for and, with a pool, the one after it.

    Args:
        read: reads the value of a key.
        keys: in the order in which they are asked for.
        pool: a thread that reads ahead.
    """

    def __init__(self, read: Callable[[int], T], keys: list[int], pool: ThreadPoolExecutor | None):
        self._read, self._pool = read, pool
        self._next = dict(pairwise(keys))
        self._held: dict[int, Future[T]] = {}

    def __getitem__(self, key: int) -> T:
        following = self._next.get(key)
        # Others first, which frees their memory before more is read.
        self._held = {k: v for k, v in self._held.items() if k in (key, following)}
        if key not in self._held:
            self._held[key] = _done(self._read, key) if self._pool is None else self._pool.submit(self._read, key)
        if self._pool is not None and following is not None and following not in self._held:
            self._held[following] = self._pool.submit(self._read, following)
        return self._held[key].result()


def _done(read: Callable[[int], T], key: int) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(read(key))
    return future


@contextlib.contextmanager
def _damage(uri: str) -> Iterator[None]:
    try:
        yield
    except PrismError:
        raise RunError(f"{uri}: not a readable label shard; delete it and run again") from None
