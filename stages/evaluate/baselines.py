"""The random-real baseline: random real images of each class, as many as were distilled."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa

from cluster import shards, storage
from cluster.errors import UserError
from cluster.resources import ActorResources
from cluster.rng import generator
from cluster.runner import ActorStage, Row, Runner
from stages.data import DataSpec
from stages.images import encode_png, to_pixels


def random_real_uri(out_uri: str) -> str:
    """Folder of the baseline's images, readable as the recovered ones are."""
    return storage.join(out_uri, "baselines", "random_real")


def choose_real(
    labels: list[list[int]], num_classes: int, ipc: int, seed: int
) -> list[list[tuple[int, int]]]:
    """Choose real images, without repeats within a class.

    Args:
        labels: of every shard in row order.
        num_classes: K.
        ipc: images per class.
        seed: of the run.

    Returns:
        For each class its ``ipc`` (shard, row) pairs.

    Raises:
        UserError: a class has fewer images.
    """
    members: list[list[tuple[int, int]]] = [[] for _ in range(num_classes)]
    for shard, column in enumerate(labels):
        for row, label in enumerate(column):
            members[label].append((shard, row))
    chosen = []
    for label, candidates in enumerate(members):
        if len(candidates) < ipc:
            raise UserError(
                f"data: class {label} has {len(candidates)} images, fewer than ipc = {ipc}; "
                "lower ipc or add images"
            )
        picks = generator(seed, "random_real", label).choice(len(candidates), ipc, replace=False)
        chosen.append([candidates[i] for i in picks])
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
        self.dataset = shards.load_dataset(dataset_uri)
        self.schema = shards.image_schema(
            list(data.class_names), shards.RECOVERED_FIELDS, {"content_sha": content_sha}
        )

    def __call__(self, row: Row) -> Row:
        """``shard``, ``rows`` and ``image_ids`` → the row's id alone."""
        name, _ = self.dataset.shards[row["shard"]]
        table = shards.read_shard(self.dataset.shard_uri(row["shard"]), ["image", "label"]).take(row["rows"])
        source = zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True)
        records = [
            self._record(name, int(at), int(image_id), image, label)
            for at, image_id, (image, label) in zip(row["rows"], row["image_ids"], source, strict=True)
        ]
        table = pa.Table.from_pylist(records, schema=self.schema)
        shards.write_shard(storage.join(self.folder, f"{row['id']}.parquet"), table)
        return {"id": row["id"], "error": ""}

    def _record(
        self, shard: str, row: int, image_id: int, image: dict[str, Any], label: int
    ) -> dict[str, Any]:
        try:
            pixels = to_pixels(image["bytes"], self.data.image_size, self.data.channels)
        except ValueError as error:
            raise UserError(
                f"{shard}: image {image['path']} is unreadable ({error}); import the data again"
            ) from None
        return {
            "image": {"bytes": encode_png(pixels), "path": f"{image_id:07d}.png"},
            "label": label,
            "image_id": image_id,
            "ipc": image_id // self.data.num_classes,
            "source_id": f"{shard}:{row}",
            "bn_teachers": [],
            "loss_bn": [],
            "iterations": 0,
            "unit_seed": self.seed,
        }


def random_real(
    out_uri: str,
    dataset_uri: str,
    data: DataSpec,
    ipc: int,
    seed: int,
    resources: ActorResources,
    runner: Runner,
) -> list[Row]:
    """Write ``baselines/random_real/part-IIIII.parquet``; IIIII = index of the real shard of its images.

    Args:
        out_uri: the run directory.
        dataset_uri: imported training data.
        data: the run's image space.
        ipc: images per class.
        seed: of the run.
        resources: of the actor pool.
        runner: serial or Ray.

    Returns:
        A row for every shard written now, with ``error`` where it failed; shards already there are kept.

    Raises:
        UserError: no dataset there, or a class with fewer images than ``ipc``.
    """
    dataset = shards.load_dataset(dataset_uri, "data.train")
    folder = random_real_uri(out_uri)
    content = [dataset.fingerprint, data.image_size, data.channels, list(data.class_names), ipc, seed]
    content_sha = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    chosen = choose_real(shards.labels_of(dataset), data.num_classes, ipc, seed)
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
    return list(runner(rows, [ActorStage("random_real", CopyStage, kwargs, resources)]))
