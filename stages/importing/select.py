"""Chosen rows of image shards as image shards of their own, the encoded bytes as they are."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster import shards, storage
from cluster.attempts import Attempts
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row
from stages.importing.stage import shard_name


@dataclass(frozen=True)
class Selection:
    """Rows that become one shard.

    Attributes:
        folder, index: of the new shard.
        shards: int32 [m], the shards that the rows come from, ascending.
        counts: int32 [m], rows from each.
        rows: int32 [sum of ``counts``], shard after shard, ascending within each.
    """

    folder: str
    index: int
    shards: NDArray[np.int32]
    counts: NDArray[np.int32]
    rows: NDArray[np.int32]

    @property
    def name(self) -> str:
        """File name of the new shard."""
        return shard_name(self.index)

    def row(self) -> Row:
        """For the stage."""
        return {
            "id": f"{self.folder}-{self.index:05d}",
            "error": "",
            "folder": self.folder,
            "name": self.name,
            "shards": self.shards,
            "counts": self.counts,
            "rows": self.rows,
        }


def select_per_shard(folder: str, masks: Sequence[NDArray[np.bool_]]) -> list[Selection]:
    """The marked rows of every shard as a shard of its number; where there are none, there is no shard.

    Args:
        folder: of the new shards.
        masks: of every shard, bool [its rows].
    """
    marked = [(index, np.flatnonzero(mask)) for index, mask in enumerate(masks)]
    return [_selection(folder, index, np.full(len(rows), index), rows) for index, rows in marked if len(rows)]


def select_packed(folder: str, masks: Sequence[NDArray[np.bool_]], size: int) -> list[Selection]:
    """All marked rows, in the data's order, as shards of ``size`` rows.

    In another order, by class for one, a new shard of shuffled data would need parts of most of the old ones.
    """
    marked = [np.flatnonzero(mask) for mask in masks]
    sources = np.repeat(np.arange(len(masks)), [len(rows) for rows in marked])
    rows = np.concatenate([np.zeros(0, np.int64), *marked])
    parts = (slice(start, start + size) for start in range(0, len(rows), size))
    return [_selection(folder, index, sources[part], rows[part]) for index, part in enumerate(parts)]


def _selection(folder: str, index: int, sources: NDArray[np.int64], rows: NDArray[np.int64]) -> Selection:
    """From the shard and the row of every image."""
    used, counts = np.unique(sources, return_counts=True)
    # The driver holds these for every image of the data: half of what labels take.
    return Selection(folder, index, *(values.astype(np.int32) for values in (used, counts, rows)))


class SelectStage:
    """Reads the rows of a selection and commits them as one shard.

    Args:
        source_uri: dataset that is selected from.
        out_uri: folder of the folders of new shards.
        content: says what all selections are made from; the new shards carry it.
        classes: labels of the selected images, ascending, which become 0, 1, …; None: labels stay as they are.
    """

    def __init__(self, source_uri: str, out_uri: str, content: str, classes: Sequence[int] | None = None):
        self.source, self.out_uri, self.classes = shards.load_dataset(source_uri), out_uri, classes
        names = self.source.class_names
        kept = names if classes is None else [names[label] for label in classes]
        self.schema = shards.image_schema(kept, metadata={"content": content})

    def __call__(self, row: Row) -> Row:
        """``Selection.row`` → ``folder`` and ``name`` again, and ``bytes``, the size of the shard."""
        uris = [self.source.shard_uri(int(shard)) for shard in row["shards"]]
        rows = np.split(row["rows"], np.cumsum(row["counts"])[:-1])
        # Each reader holds one row group, of which only the chosen rows are kept.
        with ThreadPoolExecutor(shards.READERS) as pool:
            table = pa.concat_tables(pool.map(shards.read_rows, uris, rows))
        if self.classes is not None:
            labels = np.searchsorted(self.classes, table["label"].to_numpy())
            table = table.set_column(table.schema.get_field_index("label"), "label", pa.array(labels))
        data = shards.image_shard_bytes(table.cast(self.schema))
        storage.write_bytes(storage.join(self.out_uri, row["folder"], row["name"]), data)
        return {**{key: row[key] for key in ("id", "error", "folder", "name")}, "bytes": len(data)}


def is_selected(uri: str, content: str) -> bool:
    """Whether a shard is whole and was made from ``content``; reads its footer."""
    return (shards.shard_metadata(uri) or {}).get("content") == content


def select_stage(
    source_uri: str,
    out_uri: str,
    content: str,
    resources: ActorResources,
    attempts: Attempts,
    classes: Sequence[int] | None = None,
) -> ActorStage:
    """The stage, with the arguments of ``SelectStage``; copying leaves the GPUs of ``resources`` to others."""
    kwargs = {"source_uri": source_uri, "out_uri": out_uri, "content": content, "classes": classes}
    return ActorStage("select", SelectStage, kwargs, resources.model_copy(update={"gpus": 0}), attempts)
