"""The whole job: from a folder of labelled images to image shards and ``dataset.json``."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cluster import shards, storage
from cluster.errors import RunError, UserError
from cluster.runner import Row, Runner, failures, run_ray
from stages.importing.core import ShardRecord
from stages.importing.describe import WrittenShard, describe_dataset
from stages.importing.source import Source
from stages.importing.stage import import_rows, import_stage, shard_name

IMPORT_FILE = "import.json"
CORRUPT_FILE = "corrupt.json"


@dataclass(frozen=True)
class SplitReport:
    """What became of one split.

    Attributes:
        name: ``train`` or ``val``.
        uri: its folder, a dataset of its own (``cluster.shards.load_dataset``).
        images: imported.
        corrupt: (name, reason) of the images that could not be read and are left out.
    """

    name: str
    uri: str
    images: int
    corrupt: list[tuple[str, str]]


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        src, dst, format: where from, where to, how it was read.
        class_names: in label order.
        splits: ``train``, then ``val`` where the source has one.
        ignored: files of the source that are no part of the data.
        seconds: of this call.
        already_done: the same import had been finished before; nothing was read or written.
    """

    src: str
    dst: str
    format: str
    class_names: list[str]
    splits: list[SplitReport]
    ignored: int
    seconds: float
    already_done: bool

    @property
    def corrupt(self) -> list[tuple[str, str]]:
        """Of all splits."""
        return [item for split in self.splits for item in split.corrupt]


def import_dataset(
    source: Source,
    dst: str,
    *,
    strict: bool = False,
    images_per_shard: int = 1000,
    runner: Runner = run_ray,
    on_progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Turn labelled images into image shards.

    The training split becomes the dataset ``DST/train``, the validation split (``val``, ``validation``,
    ``valid`` or ``test``), where there is one, ``DST/val``. Both have the same classes in the same order:
    that of sorted folder names, or that of the source's own metadata (CIFAR, Parquet). The images of a class stay
    in the order of their names (files) or of the source (the rest), so "the i-th image of a class" means the same
    everywhere.

    An interrupted import goes on where it was; a finished one is left alone.

    Args:
        source: what is imported.
        dst: folder to fill, local or ``s3://``.
        strict: refuse data with corrupt images, and leave nothing behind.
        images_per_shard: rows of a shard.
        runner: ``run_ray`` (needs a session) or ``run_serial``; the bytes are the same.
        on_progress: called with (finished, all) images.

    Raises:
        UserError: ``dst`` unwritable or in use for other data, or corrupt images where ``strict``.
        RunError: a shard could not be made; the same call resumes.
    """
    start = time.monotonic()
    # Workers may have another working directory.
    dst = storage.absolute(dst)
    src = source.uri
    storage.check_writable(dst, "DST")
    if f"{dst.rstrip('/')}/".startswith(f"{src.rstrip('/')}/"):
        raise UserError(f"DST: {dst} lies within SRC ({src}); choose a folder outside")
    digest = hashlib.sha256(f"{source.digest}:{images_per_shard}".encode()).hexdigest()

    done = _earlier_report(source, dst, digest)
    if done:
        if strict and done.corrupt:
            raise _corrupt_error(source, done.corrupt)
        return done

    rows = import_rows(source, images_per_shard)
    storage.write_json(storage.join(dst, IMPORT_FILE), {"digest": digest, "src": src, "report": None})
    images = {row["id"]: len(json.loads(row["labels"])) for row in rows}
    total, finished = sum(images.values()), 0
    results: dict[str, Row] = {}
    for result in runner(rows, [import_stage(source, dst, digest)]):
        results[result["id"]] = result
        finished += images[result["id"]]
        if on_progress:
            on_progress(finished, total)
    failed = failures(results.values())
    if failed:
        raise RunError(f"import of {src}: {len(failed)} shards failed ({failed[0]['error']}); run it again to resume")

    records = {key: ShardRecord.from_json(json.loads(result["record"])) for key, result in results.items()}
    corrupt = [item for key in sorted(records) for item in records[key].corrupt]
    empty = [s.name for s in source.splits if not any(r.rows for k, r in records.items() if k.startswith(s.name))]
    if empty or (strict and corrupt):
        for split in source.splits:
            storage.remove(storage.join(dst, split.name))
        storage.remove(storage.join(dst, IMPORT_FILE))
        raise _corrupt_error(source, corrupt)

    hashes = {key: str(result["sha256"]) for key, result in results.items()}
    splits = [_finish_split(source, split.name, dst, records, hashes) for split in source.splits]
    report = ImportReport(
        src, dst, source.format, source.class_names, splits, source.ignored, time.monotonic() - start, False
    )
    storage.write_json(storage.join(dst, IMPORT_FILE), {"digest": digest, "src": src, "report": asdict(report)})
    return report


def _finish_split(
    source: Source, split: str, dst: str, records: dict[str, ShardRecord], hashes: dict[str, str]
) -> SplitReport:
    """Write ``corrupt.json`` and, last, ``dataset.json`` of a split."""
    uri = storage.join(dst, split)
    keys = sorted(key for key in records if key.startswith(f"{split}-"))
    written = [WrittenShard(shard_name(i), records[key], hashes[key]) for i, key in enumerate(keys)]
    corrupt = [item for shard in written for item in shard.record.corrupt]
    if corrupt:
        storage.write_json(storage.join(uri, CORRUPT_FILE), [{"name": n, "reason": r} for n, r in corrupt])
    dataset = describe_dataset(uri, source.class_names, written)
    shards.save_dataset(dataset)
    return SplitReport(split, uri, dataset.num_images, corrupt)


def _earlier_report(source: Source, dst: str, digest: str) -> ImportReport | None:
    """The report of the same import where it is finished; None where there is something to do.

    Raises:
        UserError: ``dst`` holds other data.
    """
    where = storage.join(dst, IMPORT_FILE)
    try:
        found: dict[str, Any] = storage.read_json(where)
    except (FileNotFoundError, NotADirectoryError):
        check_unused(dst, "DST")
        return None
    except ValueError:
        raise UserError(f"DST: {where} is damaged; delete {dst} or choose another folder") from None
    if found.get("digest") != digest:
        raise UserError(
            f"DST: {dst} already holds another import (from {found.get('src')}, or changed since: "
            "files, settings); choose another folder or delete it"
        )
    report = found.get("report")
    if report is None or not all(
        storage.exists(storage.join(dst, split.name, shards.DATASET_FILE)) for split in source.splits
    ):
        return None
    splits = [
        SplitReport(s["name"], storage.join(dst, s["name"]), s["images"], [(n, r) for n, r in s["corrupt"]])
        for s in report["splits"]
    ]
    return ImportReport(
        source.uri, dst, source.format, source.class_names, splits, source.ignored, 0.0, already_done=True
    )


def check_unused(uri: str, field: str) -> None:
    """There are no files where the datasets ``URI/train`` and ``URI/val`` will be made.

    Raises:
        UserError: there are; names ``field``.
    """
    for folder in (uri, storage.join(uri, "train"), storage.join(uri, "val")):
        if storage.list_files(folder):
            raise UserError(f"{field}: {uri} already holds files of something else; choose an empty folder")


def _corrupt_error(source: Source, corrupt: list[tuple[str, str]]) -> UserError:
    name, reason = corrupt[0]
    total = sum(len(split.keys) for split in source.splits)
    return UserError(
        f"SRC: {len(corrupt)} of {total} images of {source.uri} are corrupt, the first is {name} ({reason}); "
        "repair or remove them"
    )
