"""Datasets of a search, cut out of others: what an interrupted cut has finished is kept, and known by its content."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterable, Mapping

from cluster import shards, storage
from cluster.attempts import Attempts
from cluster.errors import UserError
from cluster.ledger import Ledger, content_key
from cluster.progress import StageProgress
from cluster.runner import ActorStage, Runner
from cluster.shards import Dataset
from pipeline.context import raise_failures
from stages.importing.select import Selection, is_selected


class Target:
    """A dataset that is being cut, and what is known of its shards.

    Args:
        out: folder of its folder.
        name: of the dataset.
        content: what it is made from.
    """

    def __init__(self, out: str, name: str, content: str):
        self.name, self.uri, self.content = name, storage.join(out, name), content
        self.fingerprint = content_key(content, name)
        self.ledger = Ledger(storage.join(out, "records", name), [self.uri])
        self.selections: dict[str, Selection] = {}

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *exc: object) -> None:
        self.ledger.flush()

    def is_complete(self) -> bool:
        """Whether it can be loaded, is made from this content, and all its shards are there."""
        try:
            found = shards.load_dataset(self.uri)
        except UserError:
            return False
        return found.fingerprint == self.fingerprint and not self._missing(name for name, _ in found.shards)

    def open(self, selections: Iterable[Selection]) -> None:
        """Nobody may load it until it is closed; until then, these become its shards."""
        storage.remove(storage.join(self.uri, shards.DATASET_FILE))
        self.selections = {each.name: each for each in selections}

    def pending(self) -> list[Selection]:
        """Shards that are still to be made."""
        missing = self._missing(self.selections)
        return [each for name, each in self.selections.items() if name in missing]

    def keep(self, name: str, size: int) -> None:
        """The stage has committed a shard of so many bytes."""
        self.ledger.add(name.removesuffix(".parquet"), self.content, [size])

    def close(self, like: Dataset) -> None:
        """All shards are there: what an earlier cut left goes, and the dataset can be loaded.

        Args:
            like: describes the images, all but where they lie.
        """
        stale = storage.list_files(self.uri).keys() - self.selections.keys()
        storage.remove_files(self.uri, sorted(stale))
        shards.save_dataset(
            dataclasses.replace(
                like,
                uri=self.uri,
                shards=[(name, len(each.rows)) for name, each in self.selections.items()],
                fingerprint=self.fingerprint,
            )
        )

    def _missing(self, names: Iterable[str]) -> set[str]:
        """Shards that are not there, not whole, or made from something else."""
        wanted = {name.removesuffix(".parquet"): self.content for name in names}

        def verify(unit: str) -> bool:
            return is_selected(storage.join(self.uri, f"{unit}.parquet"), self.content)

        return {f"{unit}.parquet" for unit in wanted.keys() - self.ledger.committed(wanted, verify)}


def copy_attempts(uri: str, content: str, seed: int) -> Attempts:
    """Start records of the copying of shards.

    Args:
        uri: folder of the records.
        content: what the shards are made from.
        seed: of the run.
    """
    return Attempts(uri, uuid.uuid4().hex, "set fewer actors under resources", seed, key=content)


def copy_shards(title: str, targets: Mapping[str, Target], runner: Runner, stage: ActorStage) -> None:
    """Make all pending shards.

    Args:
        title: of the progress bar, and of errors as ``search TITLE``.
        targets: name → dataset, in the order of their shards.
        runner: serial or Ray.
        stage: that copies.

    Raises:
        RunError: some could not be made; the others are kept.
    """
    rows = [each.row() for target in targets.values() for each in target.pending()]
    total = sum(len(target.selections) for target in targets.values())
    results = []
    with StageProgress(title, total, "shards") as progress:
        progress.resume(total - len(rows))
        for row in runner(rows, [stage]) if rows else ():
            results.append(row)
            if not row["error"]:
                targets[row["folder"]].keep(row["name"], row["bytes"])
            progress.advance(f"failed: {row['id']}" if row["error"] else "")
    raise_failures(f"search {title}", results, len(rows))
