"""Import as a Ray stage: one row is one shard."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa

from cluster import shards, storage
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row
from stages.importing.core import ShardRecord, build_shard
from stages.importing.detect import open_reader
from stages.importing.source import Format, Source


class ImportStage:
    """Reads one shard's worth of images, verifies them and commits the shard.

    A shard that an earlier, interrupted import of the same source committed is taken as it is.

    Args:
        src, format: of the source.
        dst: folder of the import.
        class_names: in label order.
        digest: of the source and the way it is cut.
    """

    def __init__(self, src: str, format: Format, dst: str, class_names: list[str], digest: str):
        self.dst, self.class_names, self.digest = dst, class_names, digest
        self.read = open_reader(format, src)

    def __call__(self, row: Row) -> Row:
        """Row with ``shard``, ``keys`` and ``labels`` → row with ``record`` (JSON) and ``sha256``."""
        uri = storage.join(self.dst, row["shard"])
        stamp = f"{self.digest}:{row['id']}"
        found = shards.shard_metadata(uri)
        if found and found.get("import") == stamp:
            record, table = ShardRecord.from_json(found["record"]), shards.read_shard(uri)
        else:
            table, record = build_shard(
                json.loads(row["keys"]),
                json.loads(row["labels"]),
                self.read,
                self.class_names,
                {"import": stamp},
            )
            storage.write_bytes(uri, shards.image_shard_bytes(table))
        return {
            "id": row["id"],
            "error": "",
            "sha256": content_sha256(table, self.class_names),
            "record": json.dumps(record.to_json()),
        }


def content_sha256(table: pa.Table, class_names: list[str]) -> str:
    """Digest of a shard's images and labels, whose file another version of pyarrow would write in other bytes."""
    digest = hashlib.sha256(json.dumps(class_names).encode())
    for image, label in zip(table["image"], table["label"], strict=True):
        content = image["bytes"].as_py()
        digest.update(f"{label.as_py()} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def shard_name(index: int) -> str:
    """File name of a shard within its split."""
    return f"part-{index:05d}.parquet"


def import_rows(source: Source, images_per_shard: int) -> list[Row]:
    """One row per shard of every split; ids sort in the order of splits and shards."""
    rows: list[dict[str, Any]] = []
    for split in source.splits:
        for index, start in enumerate(range(0, len(split.keys), images_per_shard)):
            part = slice(start, start + images_per_shard)
            rows.append(
                {
                    "id": f"{split.name}-{index:05d}",
                    "error": "",
                    "shard": f"{split.name}/{shard_name(index)}",
                    "keys": json.dumps(split.keys[part]),
                    "labels": json.dumps(split.labels[part]),
                }
            )
    return rows


def import_stage(source: Source, dst: str, digest: str) -> ActorStage:
    """The stage for ``source``; one actor per CPU, since decoding is all it does."""
    return ActorStage(
        name="import",
        factory=ImportStage,
        kwargs={
            "src": source.uri,
            "format": source.format,
            "dst": dst,
            "class_names": source.class_names,
            "digest": digest,
        },
        resources=ActorResources(gpus=0),
    )
