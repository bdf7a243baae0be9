"""Label shards: one row per (epoch, position) with the view that the teachers saw and their combined logits.

A shard holds whole epochs, or a range of positions of one epoch where an epoch is large. Its name carries the
first epoch and position it holds, so a reader of one epoch opens that epoch's shards alone. Rows are single
images: any training batch size is a slice of positions, and a mixing partner may come from anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from cluster import shards, storage
from cluster.errors import PrismError, RunError
from stages.data import DataSpec
from stages.relabel.unit import LabelUnit
from stages.relabel.views import EpochViews, render_views

SHARD_NAME = re.compile(r"labels-(\d+)-(\d+)\.parquet")
AGAIN = "run the relabel stage again"


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


@dataclass(frozen=True)
class EpochLabels:
    """All labels of one epoch.

    Attributes:
        views: what the teachers saw.
        logits: float16 [N, C], by position: row p belongs to the view of image ``order[p]``.
    """

    views: EpochViews
    logits: NDArray[np.float16]

    @property
    def order(self) -> NDArray[np.int64]:
        """int64 [N], position → image id."""
        return self.views.order

    def render(self, images: Tensor, positions: NDArray[np.int64] | slice, data: DataSpec) -> Tensor:
        """The very pixels that the teachers labelled.

        Args:
            images: uint8 [N, C, S, S], rows are image ids.
            positions: which rows of the epoch, B of them.
            data: normalisation.

        Returns:
            Normalised float32 [B, C, S, S] on the device of ``images``.
        """
        return render_views(images, self.views, self.order[positions], data)


class LabelReader:
    """Reads a folder of label shards epoch by epoch.

    Attributes:
        metadata: what the labels were made with: ``class_names``, ``ensemble``, ``teachers``, ``identity``,
            ``num_images``, ``relabel`` (the options), ``seed``.

    Raises:
        RunError: no labels, or of other classes than ``data``'s (when given).
    """

    def __init__(self, uri: str, data: DataSpec | None = None):
        self.uri = uri
        self._names: dict[int, list[str]] = {}
        for name in storage.list_files(uri, ".parquet"):
            if match := SHARD_NAME.fullmatch(name):
                self._names.setdefault(int(match[1]), []).append(name)
        first = self._names[min(self._names)][0] if self._names else None
        found = shards.shard_metadata(storage.join(uri, first)) if first else None
        if found is None:
            raise RunError(f"{uri}: no readable label shards; {AGAIN}")
        self.metadata: dict[str, Any] = found
        if data is not None and found["class_names"] != list(data.class_names):
            raise RunError(f"{uri}: the labels are of other classes, or in another order, than the data; {AGAIN}")
        self._loaded: tuple[int, dict[str, NDArray[Any]]] | None = None

    def read_epoch(self, epoch: int) -> EpochLabels:
        """Labels of one epoch; reading epochs in order opens every shard once.

        Raises:
            RunError: the epoch is not there as a whole, or its shards belong to different runs.
        """
        columns = self._load(max((start for start in self._names if start <= epoch), default=-1))
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
        return EpochLabels(views, columns["logits"][rows])

    def _load(self, start: int) -> dict[str, NDArray[Any]]:
        """Columns of the shards whose first epoch is ``start``; the last ones are kept."""
        loaded = self._loaded
        if loaded is None or loaded[0] != start:
            loaded = self._loaded = None  # frees the memory before the next shards are read
            tables = [self._read(name) for name in self._names.get(start, [])]
            if not tables:
                raise RunError(f"{self.uri}: labels of the first epochs are missing; {AGAIN}")
            table = pa.concat_tables(tables)
            self._loaded = loaded = start, {name: _to_numpy(table[name]) for name in table.column_names}
        return loaded[1]

    def _read(self, name: str) -> pa.Table:
        uri = storage.join(self.uri, name)
        try:
            table = shards.read_shard(uri)
        except PrismError:
            raise RunError(f"{uri}: not a readable label shard; delete it and run again") from None
        metadata = json.loads(table.schema.metadata[b"prism"])
        if any(metadata.get(key) != self.metadata[key] for key in ("identity", "num_images", "class_names")):
            raise RunError(f"{uri}: belongs to another run than the shards beside it; {AGAIN}")
        return table.replace_schema_metadata(None)
