"""The random-real baseline: random real images of each class, as many as were distilled."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from cluster import shards, storage
from cluster.attempts import Attempts
from cluster.classes import ClassIndex
from cluster.errors import UserError
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row, Runner
from stages.data import DataSpec
from stages.images import encode_png
from stages.recover.sources import SourceReader


def random_real_set(draw: int) -> str:
    """Name of a draw's image set: ``random_real``, ``random_real-1``, …"""
    return f"random_real-{draw}" if draw else "random_real"


def random_real_uri(out_uri: str, draw: int = 0) -> str:
    """Folder of a draw's images, readable as the recovered ones are."""
    return storage.join(out_uri, "baselines", random_real_set(draw))


def choose_real(
    labels: Sequence[ArrayLike], num_classes: int, ipc: int, seed: int, draw: int = 0
) -> list[list[tuple[int, int]]]:
    """Choose real images, without repeats within a class.

    Args:
        labels: of every shard in row order.
        num_classes: K.
        ipc: images per class.
        seed: of the run.
        draw: number of the draw.

    Returns:
        For each class its ``ipc`` (shard, row) pairs.

    Raises:
        UserError: a class has fewer images.
    """
    images = ClassIndex(labels, num_classes)
    chosen = []
    for label in range(num_classes):
        count = images.count(label)
        if count < ipc:
            raise UserError(f"data: class {label} has {count} images, fewer than ipc = {ipc}; lower ipc or add images")
        chosen.append(images.draw(label, ipc, seed, random_real_set(draw)))
    return chosen


class CopyStage:
    """Writes the chosen images of one real shard as one shard of the baseline.

    Args:
        folder: of the baseline.
        dataset_uri: real training data.
        data: image size and channels.
        seed: of the run.
        content_sha: of what the shard holds, checked on resume.
    """

    def __init__(self, folder: str, dataset_uri: str, data: DataSpec, seed: int, content_sha: str):
        self.folder, self.data, self.seed = folder, data, seed
        self.reader = SourceReader(shards.load_dataset(dataset_uri), data)
        metadata = {"content_sha": content_sha}
        self.schema = shards.image_schema(list(data.class_names), shards.RECOVERED_FIELDS, metadata)

    def __call__(self, row: Row) -> Row:
        """``shard``, ``rows`` and ``image_ids`` → the row's id alone."""
        classes = self.data.num_classes
        ids = [int(image_id) for image_id in row["image_ids"]]
        sources = [(row["shard"], int(at)) for at in row["rows"]]
        found = self.reader.read(sources, [image_id % classes for image_id in ids])
        records = [
            {
                "image": {"bytes": encode_png(pixels.numpy()), "path": f"{label:05d}/{ipc:05d}.png"},
                "label": label,
                "image_id": ipc * classes + label,
                "ipc": ipc,
                "source_id": name,
                "unit_seed": self.seed,
            }
            for (ipc, label), pixels, name in zip(
                (divmod(image_id, classes) for image_id in ids), found.pixels, found.names, strict=True
            )
        ]
        table = pa.Table.from_pylist(records, schema=self.schema)
        shards.write_shard(storage.join(self.folder, f"{row['id']}.parquet"), table)
        return {"id": row["id"], "error": ""}


def random_real(
    out_uri: str,
    dataset_uri: str,
    data: DataSpec,
    ipc: int,
    seed: int,
    resources: ActorResources,
    runner: Runner,
    draw: int = 0,
) -> list[Row]:
    """Write ``part-IIIII.parquet`` of a draw's image set; IIIII = index of the real shard of its images.

    Args:
        out_uri: the run directory.
        dataset_uri: imported training data.
        data: the run's image space.
        ipc: images per class.
        seed: of the run.
        resources: of the actor pool; its GPUs are left to others.
        runner: serial or Ray.
        draw: number of the draw.

    Returns:
        A row for every shard written now, with ``error`` where it failed; shards already there are kept.

    Raises:
        UserError: no dataset there, or a class with fewer images than ``ipc``.
    """
    dataset = shards.load_dataset(dataset_uri, "data.train")
    folder = random_real_uri(out_uri, draw)
    content = [
        dataset.fingerprint,
        data.image_size,
        data.channels,
        list(data.class_names),
        ipc,
        seed,
        *([draw] if draw else []),
    ]
    content_sha = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    chosen = choose_real(shards.labels_of(dataset), data.num_classes, ipc, seed, draw)
    parts: dict[int, list[tuple[int, int]]] = {}
    for label, pairs in enumerate(chosen):
        for index, (shard, row) in enumerate(pairs):
            parts.setdefault(shard, []).append((row, index * data.num_classes + label))
    rows: list[Row] = []
    wanted = set()
    for shard, picks in sorted(parts.items()):
        name = f"part-{shard:05d}"
        wanted.add(f"{name}.parquet")
        found = shards.shard_metadata(storage.join(folder, f"{name}.parquet"))
        if found and found.get("content_sha") == content_sha:
            continue
        at, ids = np.array(sorted(picks), dtype=np.int64).T
        rows.append({"id": name, "error": "", "shard": shard, "rows": at, "image_ids": ids})
    for stale in set(storage.list_files(folder)) - wanted:
        storage.remove(storage.join(folder, stale))
    kwargs = {
        "folder": folder,
        "dataset_uri": dataset_uri,
        "data": data,
        "seed": seed,
        "content_sha": content_sha,
    }
    # Decoding and encoding alone.
    resources = resources.model_copy(update={"gpus": 0})
    records = storage.join(out_uri, "progress", "starts", random_real_set(draw))
    attempts = Attempts(records, uuid.uuid4().hex, "lower resources.relabel.actors")
    return list(runner(rows, [ActorStage("random_real", CopyStage, kwargs, resources, attempts)]))
