"""The units of a stage that commits shards, and which of them are still to be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cluster import storage
from cluster.ledger import Ledger
from cluster.runner import Row
from pipeline.context import Run
from stages.recover import stage as recovery
from stages.recover.unit import RecoverUnit
from stages.relabel import stage as relabelling
from stages.relabel.unit import LabelUnit

Unit = TypeVar("Unit", RecoverUnit, LabelUnit)


@dataclass(frozen=True)
class Work(Generic[Unit]):
    """Units of one stage on one image set.

    Attributes:
        units: unit's id → unit.
        keys: unit's id → digest of what its shards must hold.
        ledger: of its shards.
        verify: opens a unit's shards; whether they are whole and of this run.
    """

    units: dict[str, Unit]
    keys: dict[str, str]
    ledger: Ledger
    verify: Callable[[Unit], bool]

    def pending(self) -> list[Unit]:
        """Units that are not committed, in the plan's order."""
        # What is recorded as gone must be so before the work starts.
        with self.ledger:
            done = self.ledger.committed(self.keys, lambda name: self.verify(self.units[name]))
        return [unit for name, unit in self.units.items() if name not in done]

    def keep(self, row: Row) -> None:
        """Record what a finished unit's row reports."""
        self.ledger.add(row["id"], self.keys[row["id"]], row["sizes"])


def recover_work(run: Run) -> Work[RecoverUnit]:
    """The units of recovery."""
    identity = run.image_identity
    return Work(
        {unit.id: unit for unit in run.sourced_units},
        {unit.id: recovery.unit_key(unit, identity) for unit in run.units},
        Ledger(_records(run, "recover"), recovery.folders(run.out, run.config.recover)),
        lambda unit: recovery.is_committed(run.out, unit, identity),
    )


def relabel_work(run: Run, name: str) -> Work[LabelUnit]:
    """The label shards of an image set."""
    identity, labels = run.label_identity, run.labels_uri(name)
    return Work(
        {unit.id: unit for unit in run.label_units},
        {unit.id: relabelling.unit_key(unit, identity) for unit in run.label_units},
        Ledger(_records(run, f"labels-{name}"), [labels]),
        lambda unit: relabelling.is_committed(labels, unit, identity),
    )


def _records(run: Run, name: str) -> str:
    return storage.join(run.out, "progress", "ledger", name)
