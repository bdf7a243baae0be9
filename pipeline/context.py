"""A checked run: where its parts lie, what they are made from, and how its stages are driven."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from cluster import storage
from cluster.errors import RunError, UserError
from cluster.metrics import DriverMetrics
from cluster.progress import StageProgress
from cluster.record import RecordWriter
from cluster.runner import ActorStage, Row, Runner
from cluster.shards import labels_of
from pipeline.config import Config
from pipeline.plan import make_plan, with_sources
from pipeline.preflight import Ready
from stages.evaluate.baselines import random_real_set
from stages.evaluate.jobs import HARD_LABEL
from stages.recover.unit import RecoverUnit
from stages.relabel.unit import LabelUnit, plan_units
from stages.teachers.card import TeacherCard, read_card
from stages.teachers.options import TeacherSpec

DISTILLED, RANDOM_REAL = "distilled", "random_real"


def baseline_title(draw: int) -> str:
    """Title, and name of the record, of labelling a draw of random real images."""
    return f"baseline {draw}" if draw else "baseline"


def methods(config: Config) -> list[str]:
    """Name of every method whose students a run compares."""
    return [config.recipe] + [name for name in (RANDOM_REAL, HARD_LABEL) if name in config.evaluate.baselines]


@dataclass(frozen=True)
class Run:
    """A checked run and the way its stages are driven."""

    config: Config
    ready: Ready
    runner: Runner
    serial: bool

    @property
    def out(self) -> str:
        """The run directory."""
        return self.config.out

    @property
    def teachers_uri(self) -> str:
        """Folder of the finished teachers."""
        return storage.join(self.out, "teachers")

    @cached_property
    def units(self) -> list[RecoverUnit]:
        """The plan."""
        return make_plan(self.config, self.ready.data.num_classes)

    @cached_property
    def sourced_units(self) -> list[RecoverUnit]:
        """The plan with the initial real images, where it starts from such."""
        if self.config.recover.init != "real":
            return self.units
        return with_sources(self.units, labels_of(self.ready.train), self.ready.data.num_classes)

    @cached_property
    def label_units(self) -> list[LabelUnit]:
        """Label shards of an image set."""
        classes = self.ready.data.num_classes
        return plan_units(self.config.recover.ipc * classes, classes, self.config.relabel)

    @cached_property
    def image_identity(self) -> str:
        """Hash of what images are made from: configuration, data, teachers' weights, torch threads, placement.

        Known once the teachers are there; a shard of another identity is redone.
        """
        content = {
            "config": self.config.sha256(),
            "data": self.ready.train.fingerprint,
            "teachers": {name: self.card(name).sha256 for name in self.config.teachers},
            "threads": self.config.resources.recover.threads,
        }
        # What it was before there was a choice stays valid.
        if self.config.resources.placement != "colocated":
            content["placement"] = self.config.resources.placement
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def label_identity(self) -> str:
        """The same of labels."""
        content = {"images": self.image_identity, "threads": self.config.resources.relabel.threads}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def card(self, name: str) -> TeacherCard:
        """Card of a finished teacher.

        Raises:
            UserError: there is none.
        """
        found = read_card(storage.join(self.teachers_uri, name))
        if found is None:
            raise UserError(
                f"out: {self.out} lacks teacher {name}; run `prism squeeze` with the same configuration first"
            )
        return found

    @cached_property
    def teachers(self) -> dict[str, TeacherSpec]:
        """Specifications with the run's own copy of the weights."""
        return {
            name: spec.model_copy(
                update={
                    "weights": storage.join(self.teachers_uri, name, "model.safetensors"),
                    "key_map": type(spec.key_map)(),
                }
            )
            for name, spec in self.config.teachers.items()
        }

    def images_uri(self, name: str) -> str:
        """Folder of an image set: the distilled one or a baseline's."""
        return storage.join(self.out, *(["recovered"] if name == DISTILLED else ["baselines", name]))

    def labels_uri(self, name: str) -> str:
        """Folder of an image set's label shards."""
        return storage.join(self.out, "labels", name)

    @cached_property
    def image_sets(self) -> list[str]:
        """Image sets that are labelled."""
        return [DISTILLED] + [random_real_set(draw) for draw in self.config.evaluate.real_draws]

    def drive(
        self,
        title: str,
        rows: list[Row],
        stages: list[ActorStage],
        unit: str,
        total: int,
        keep: Callable[[Row], None] = lambda row: None,
    ) -> list[Row]:
        """Push rows through stages and show how far they are.

        Args:
            title: of the progress bar.
            rows: pending units.
            stages: of the pipeline.
            unit: what is counted.
            total: of all units; those not pending were done before.
            keep: called with the row of every unit that succeeded, as it comes.

        Raises:
            RunError: units failed; the rest was finished first.
        """
        results = []
        stage = title.strip()
        uri, metrics = storage.join(self.out, "progress", stage), DriverMetrics(stage)
        with (
            StageProgress(title, total, unit) as progress,
            RecordWriter(uri, unit, total, [row["id"] for row in rows], on_write=metrics.update) as writer,
        ):
            progress.resume(total - len(rows))
            for row in self.runner(rows, stages) if rows else ():
                results.append(row)
                if not row["error"]:
                    keep(row)
                writer.add(row)
                metrics.update(writer.record, row)
                progress.advance(f"failed: {row['id']}" if row["error"] else "")
        raise_failures(title, results, len(rows))
        if rows:
            # Nothing of it will be started again.
            for records in (records for each in stages for records in (each.attempts, each.starts) if records):
                records.clear()
        return results


def raise_failures(title: str, rows: Sequence[Row], expected: int | None = None) -> None:
    """Raise what failed, as one error that says how to go on.

    Raises:
        RunError: some rows carry an error, or rows are missing.
    """
    failed = [row for row in rows if row["error"]]
    if failed:
        first = "\n".join(f"{row['id']}: {row['error']}" for row in failed[:5])
        more = f"\n… and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise RunError(
            f"{title}: {len(failed)} of {len(rows)} failed, the others are kept; run the same command again to resume\n"
            f"{first}{more}"
        )
    if expected is not None and len(rows) != expected:
        raise RunError(f"{title}: {expected - len(rows)} of {expected} got lost; run the same command again to resume")
