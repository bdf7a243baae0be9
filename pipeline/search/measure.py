"""One job of a search: distil, label and train a student at one point and rung, in this process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cluster import storage
from cluster.errors import PrismError, RunError, TransientError, redact
from cluster.ledger import content_key
from cluster.progress import console
from cluster.resources import ActorResources, TrainResources
from cluster.runner import run_bare
from pipeline import steps
from pipeline.config import Config, ResourcesConfig
from pipeline.context import Run
from pipeline.preflight import Ready, check_data
from pipeline.search.trial import PREPARED, Measured
from pipeline.work import recover_work
from stages.evaluate.validate import read_results
from stages.recover import stage as recovery
from stages.recover.unit import RecoverUnit
from stages.teachers.arch import code_sha256, portable_arch
from stages.teachers.options import TeacherSpec

# What only decides which units there are: two pools whose draw for an index is the same share that unit.
PLANNING = {
    "ipc", "chunk", "iterations", "stagger", "logit_teachers", "bn_teachers", "include_prob", "max_bn_teachers",
    "selection", "checkpoint_every",
}  # fmt: skip
# Of selections that draw at every step, what they draw by.
DRAWING = {"selection", "include_prob", "max_bn_teachers"}


def lighten(config: Config, threads: int, gpu: bool, seeds: list[int]) -> Config:
    """A configuration as a job runs it: nothing but its own students, on what it has.

    Args:
        config: at a point and a rung.
        threads: of torch.
        gpu: whether it has one, or a part; else it leaves those that it may see to others.
        seeds: of the students.
    """
    actors = ActorResources(threads=threads, gpus=None if gpu else 0)
    trainers = TrainResources(threads=threads, gpus=None if gpu else 0)
    resources = ResourcesConfig(recover=actors, relabel=actors, evaluate=trainers, validate=actors)
    protocol = config.evaluate.protocol.model_copy(update={"val_every": config.relabel.epochs})
    evaluate = config.evaluate.model_copy(update={"seeds": seeds, "baselines": [], "protocol": protocol})
    return config.model_copy(update={"resources": resources, "evaluate": evaluate, "search": None})


@dataclass(frozen=True)
class JobRun(Run):
    """A run that takes its teachers, and units of recovery that others made, from the search's folder.

    Attributes:
        root: of the search.
    """

    root: str = ""

    @property
    def teachers_uri(self) -> str:
        """Trained once for the search."""
        return storage.join(self.root, PREPARED, "teachers")

    @cached_property
    def teachers(self) -> dict[str, TeacherSpec]:
        """Those of the search, which know all classes, by their outputs of the job's."""
        return {name: spec.model_copy(update=self._outputs(name)) for name, spec in super().teachers.items()}

    def _outputs(self, name: str) -> dict[str, Any]:
        card, given = self.card(name), self.config.teachers[name].class_index
        index = given or card.class_index or {known: k for k, known in enumerate(card.class_names or [])}
        return {"num_outputs": card.num_outputs, "class_index": index}

    @cached_property
    def image_identity(self) -> str:
        """Hash of all that a unit's pixels depend on beside the unit itself."""
        recover = self.config.recover
        at_steps = recover.selection in ("per_step", "round_robin")
        content = {
            "recover": recover.model_dump(mode="json", exclude=PLANNING),
            "draw": recover.model_dump(mode="json", include=DRAWING) if at_steps else None,
            "data": [self.ready.train.fingerprint, self.config.data.model_dump(mode="json", exclude={"train", "val"})],
            "teachers": {
                name: [
                    spec.model_dump(mode="json", exclude={"weights"}) | {"arch": portable_arch(spec.arch)},
                    self.card(name).sha256,
                    code_sha256(spec.arch),
                ]
                for name, spec in self.config.teachers.items()
            },
            "threads": self.config.resources.recover.threads,
        }
        return content_key(content)

    @cached_property
    def label_identity(self) -> str:
        """Of labels, which are not shared."""
        return self.key

    @cached_property
    def key(self) -> str:
        """Hash of all that the result depends on."""
        config = {
            **self.config.identity(),
            "evaluate": self.config.evaluation(),
            "resources": self.config.resources.model_dump(mode="json", by_alias=True, exclude={"probe"}),
        }
        code = [code_sha256(network.arch) for network in self.config.evaluate.students.values()]
        return content_key(config, code, self.image_identity, self.ready.val.fingerprint)


def measure(root: str, config: Config, job: str) -> Measured:
    """Measure a configuration of ``lighten``; what was measured before is not done again.

    Args:
        root: folder of the search, which holds the prepared teachers.
        config: of the job; its data are those of the search.
        job: names the job's own folder, in which it goes on when it was interrupted.

    Raises:
        PrismError: the point cannot be measured, now or at an earlier time; see the stages.
        Exception: what else stopped it (a full disk, a device, an object store away) is nothing that the point did, and
            not recorded.
    """
    with _quiet():
        run = _run(root, config, job)
        found = _known(run)
        if found is None:
            start = time.monotonic()
            try:
                found = {**_measure(run), "seconds": round(time.monotonic() - start, 2)}
            except TransientError:
                raise
            except PrismError as error:
                found = {"reason": redact(" ".join(str(error).split()))[:500]}
            storage.write_json(_record(run), found)
            storage.remove(run.out)
        if "reason" in found:
            raise RunError(found["reason"])
        return Measured(**found)


def look_up(root: str, config: Config) -> dict[str, Any] | None:
    """What ``measure`` found: fields of ``Measured``, or the ``reason`` of a failure; None: it was not called yet."""
    return _known(_run(root, config, "none"))


def _run(root: str, config: Config, job: str) -> JobRun:
    train, val, data = check_data(config)
    ready = Ready(train, val, data, {}, {})
    named = JobRun(config, ready, run_bare, True, root)
    # By content too: another search, or a longer one, may give the job's name to another point.
    out = storage.join(root, "jobs", f"{job}-{named.key[:12]}")
    return JobRun(config.model_copy(update={"out": out}), ready, run_bare, True, root)


def _record(run: JobRun) -> str:
    return storage.join(run.root, "measured", f"{run.key}.json")


def _known(run: JobRun) -> dict[str, Any] | None:
    return dict(storage.read_json(_record(run))) if storage.exists(_record(run)) else None


def _measure(run: JobRun) -> dict[str, Any]:
    shared = _fetch(run)
    steps.recover(run)
    _publish(run)
    steps.relabel(run)
    steps.evaluate(run)
    top1 = [result["top1_last"] for result in read_results(run.out, steps.jobs_of(run))]
    return {
        "top1": sum(top1) / len(top1),
        "top1_seeds": top1,
        "units": len(run.units),
        "units_shared": shared,
    }


def _fetch(run: JobRun) -> int:
    """Copy units that were made for others into the job's folder; returns how many of its units those are."""
    there = storage.list_files(_store(run), ".parquet")
    shared = 0
    for unit in recover_work(run).pending():
        names = _names(run, unit)
        if all(name in there for name in names.values()):
            for folder, name in names.items():
                content = storage.read_bytes(storage.join(_store(run), name))
                storage.write_bytes(storage.join(folder, f"{unit.id}.parquet"), content)
            shared += 1
    return shared


def _publish(run: JobRun) -> None:
    """Leave the job's units to others."""
    there = storage.list_files(_store(run), ".parquet")
    for unit in run.units:
        for folder, name in _names(run, unit).items():
            if name not in there:
                content = storage.read_bytes(storage.join(folder, f"{unit.id}.parquet"))
                storage.write_bytes(storage.join(_store(run), name), content)


def _store(run: JobRun) -> str:
    return storage.join(run.root, "units")


def _names(run: JobRun, unit: RecoverUnit) -> dict[str, str]:
    """Folder of the job → name of the unit's shard in the store."""
    key = recovery.unit_key(unit, run.image_identity)
    folders = recovery.folders(run.out, run.config.recover)
    return {folder: f"{key}-{folder.rpartition('/')[2]}.parquet" for folder in folders}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Jobs run beside each other: what each would show of its stages means nothing to anybody."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before
