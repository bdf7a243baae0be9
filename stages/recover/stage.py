"""Recovery as a pipeline stage: an actor that keeps its teachers for life and commits one shard per unit."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from torch import Tensor

from cluster import preemption, shards, storage
from cluster.attempts import Attempt, Attempts
from cluster.errors import HelperLost, RunError
from cluster.ledger import content_key
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row
from stages.data import DataSpec
from stages.device import pick_device
from stages.images import encode_png
from stages.recover.core import recover_unit
from stages.recover.objective import LocalObjective, Objective
from stages.recover.options import Placement, RecoverOptions
from stages.recover.placement import prepare_process, split_objective, unit_resources
from stages.recover.sources import SourceReader
from stages.recover.state import RecoveryState
from stages.recover.unit import RecoverUnit
from stages.teachers.options import TeacherSpec
from stages.teachers.teacher import load_teacher

log = logging.getLogger("prism")


class RecoverStage:
    """Recovers one unit per row. Loads the teachers once.

    Args:
        out: run directory; gets ``init/UNIT.parquet``, then ``recovered/UNIT.parquet``.
        train_uri: the real data, source of initial images.
        teachers: those in use, with ``weights`` set.
        data: image space.
        options: of recovery.
        identity: what the images depend on, in one string; a shard of another identity is redone.
        session: tells this run's attempts from those of an earlier, interrupted one.
        gpu: use the actor's GPU where it has one.
        split: every teacher has an actor of its own; None: all are here.
    """

    def __init__(
        self,
        out: str,
        train_uri: str,
        teachers: Mapping[str, TeacherSpec],
        data: DataSpec,
        options: RecoverOptions,
        identity: str,
        session: str,
        gpu: bool,
        split: ActorResources | None = None,
    ):
        # With its teachers elsewhere, an actor computes little, and leaves the devices to them.
        self.device = pick_device(gpu and split is None)
        if not split:
            prepare_process(self.device, options)
        self.specs, self.split = dict(teachers), split
        here = {} if split else teachers
        self.teachers = {name: load_teacher(name, spec, data, self.device) for name, spec in here.items()}
        # One for all units, which share what it compiles.
        self.objective: Objective | None = None if split else LocalObjective(self.teachers, options)
        self.out, self.data, self.options, self.identity = out, data, options, identity
        self.attempts = Attempts(
            storage.join(out, "progress", "recover"), session, "lower resources.recover.actors or recover.chunk"
        )
        real = options.init == "real"
        self.reader = SourceReader(shards.load_dataset(train_uri), data) if real else None

    def __call__(self, row: Row) -> Row:
        """Recover and commit a unit.

        Upon a notice of preemption the unit's state is kept and the process ends.

        Returns:
            ``id``, ``error``, ``seconds``, ``images``, ``loss_ce``, ``iterations``, ``attempt`` (starts, over all runs)
            and ``sizes`` (bytes of the shards in ``folders``).

        Raises:
            RunError: see ``recover_unit``; or the unit's worker was killed too often.
        """
        unit = RecoverUnit.model_validate_json(row["unit"])
        with preemption.busy():
            # Ray asks again for what was finished when the machine that held the result is lost.
            if self.attempts.begun(unit.id) and is_committed(self.out, unit, self.identity):
                return self._finished(unit)
            return self._recover(unit)

    def _against(self) -> Objective:
        """The objective.

        One whose teachers are elsewhere is not made in the constructor: there may be no room for it yet, and to Ray an
        actor that waits is none.
        """
        if self.objective is None:
            assert self.split is not None
            self.objective = split_objective(self.specs, self.data, self.options, self.split)
        return self.objective

    def _recover(self, unit: RecoverUnit) -> Row:
        start = time.monotonic()
        state = self._kept(unit)
        attempt = self.attempts.begin(
            unit.id,
            unit.iterations,
            f"unit {unit.id} (seed {unit.seed})",
            done=state.step if state else 0,
            key=self.identity,
        )
        names: list[str | None] = [None] * len(unit.classes)
        images, sizes = None, []
        if self.reader:
            sources = self.reader.read(unit.sources, unit.classes)
            names = list(sources.names)
            images = self.data.normalise(sources.pixels)
            sizes.append(self._commit(_init_uri(self.out, unit), unit, sources.pixels, names, {}))
        last: list[tuple[int, Callable[[], RecoveryState]]] = []

        def on_state(done: int, snapshot: Callable[[], RecoveryState]) -> None:
            last[:] = [(done, snapshot)]
            self._keep(unit, attempt, done, snapshot)

        try:
            result = recover_unit(
                unit,
                images,
                self._against(),
                self.options,
                self.data,
                self.device,
                on_step=lambda done, total: attempt.update(done),
                state=state,
                on_state=on_state,
            )
        except HelperLost:
            if preemption.noticed():
                attempt.excuse(last[0][0] if last else 0)
            # What the teachers were asked for is lost, the pixels are not: Ray starts the unit, and teachers, again.
            if last:
                self._write_state(unit, *last[0])
            preemption.leave()
        outcome = {
            "logit_teacher": ",".join(unit.logit_teachers),
            "bn_teachers": list(result.loss_bn),
            "loss_ce": result.loss_ce,
            "loss_bn": list(result.loss_bn.values()),
            "iterations": result.iterations,
        }
        recovered = _recovered_uri(self.out, unit)
        sizes.append(self._commit(recovered, unit, result.pixels, names, outcome, log=result.log))
        attempt.finish()
        self._forget(unit)
        return {
            "id": unit.id,
            "error": "",
            "seconds": time.monotonic() - start,
            "images": len(unit.classes),
            "loss_ce": result.loss_ce,
            "iterations": result.iterations,
            "attempt": attempt.number,
            "sizes": sizes,
        }

    def _finished(self, unit: RecoverUnit) -> Row:
        """The row of a unit that was committed before."""
        self._forget(unit)
        found = shards.read_shard(_recovered_uri(self.out, unit), ["loss_ce", "iterations"]).slice(0, 1).to_pylist()[0]
        uris = [storage.join(folder, f"{unit.id}.parquet") for folder in folders(self.out, self.options)]
        sizes = [storage.size(uri) for uri in uris]
        attempt = self.attempts.finish(unit.id)
        row = {"id": unit.id, "error": "", "seconds": 0.0, "images": len(unit.classes), **found}
        return row | {"attempt": attempt, "sizes": sizes}

    def _key(self, unit: RecoverUnit) -> dict[str, Any]:
        """What a kept state belongs to."""
        return {"identity": self.identity, "unit": _content(unit)}

    def _kept(self, unit: RecoverUnit) -> RecoveryState | None:
        """The state that an earlier start left, if it is whole and of this very unit."""
        try:
            content = storage.read_bytes(_state_uri(self.out, unit))
        except OSError:
            return None
        return RecoveryState.from_bytes(content, self._key(unit))

    def _forget(self, unit: RecoverUnit) -> None:
        # The unit is committed; what is left behind is of no harm.
        with contextlib.suppress(OSError, RunError):
            storage.remove(_state_uri(self.out, unit))

    def _keep(self, unit: RecoverUnit, attempt: Attempt, done: int, snapshot: Callable[[], RecoveryState]) -> None:
        """Keep the state now and then, and upon a notice, whatever ``checkpoint_every`` says: it costs little."""
        notice, every = preemption.noticed(), self.options.checkpoint_every
        if notice or (every and done % every == 0):
            self._write_state(unit, done, snapshot)
        if notice:
            attempt.excuse(done)
            preemption.leave()

    def _write_state(self, unit: RecoverUnit, done: int, snapshot: Callable[[], RecoveryState]) -> None:
        try:
            storage.write_bytes(_state_uri(self.out, unit), snapshot().to_bytes(self._key(unit)))
        except (OSError, RunError) as error:
            # The unit itself may still succeed.
            log.warning("%s: the state after step %d could not be kept: %s", unit.id, done, error)

    def _commit(
        self,
        uri: str,
        unit: RecoverUnit,
        pixels: Tensor,
        names: Sequence[str | None],
        outcome: Mapping[str, Any],
        **metadata: Any,
    ) -> int:
        """Write images of a unit as one shard; columns that ``outcome`` lacks stay null. Returns its bytes."""
        rows = [
            {
                "image": {"bytes": encode_png(image.numpy()), "path": f"{label:05d}/{unit.ipc:05d}.png"},
                "label": label,
                "image_id": unit.ipc * self.data.num_classes + label,
                "ipc": unit.ipc,
                "source_id": name,
                "unit_seed": unit.seed,
                **outcome,
            }
            for image, label, name in zip(pixels, unit.classes, names, strict=True)
        ]
        metadata |= {"unit": _content(unit), "identity": self.identity}
        schema = shards.image_schema(list(self.data.class_names), shards.RECOVERED_FIELDS, metadata)
        return shards.write_shard(uri, pa.Table.from_pylist(rows, schema=schema))


def recover_stage(
    out: str,
    train_uri: str,
    teachers: Mapping[str, TeacherSpec],
    data: DataSpec,
    options: RecoverOptions,
    identity: str,
    resources: ActorResources,
    placement: Placement = "colocated",
) -> ActorStage:
    """The stage for a runner.

    Args:
        out: run directory.
        train_uri: the real data.
        teachers: all of the run, with ``weights`` set; only those that recovery uses are loaded.
        data: image space.
        options: of recovery.
        identity: what the images depend on, in one string.
        resources: of one actor and the pool; with ``per_teacher``, of one teacher's actor and the number of units at
            the same time.
        placement: of the teachers.
    """
    used = dict.fromkeys([*options.logit_teachers, *options.bn_teachers])
    session = uuid.uuid4().hex
    return ActorStage(
        name="recover",
        factory=RecoverStage,
        kwargs={
            "out": out,
            "train_uri": train_uri,
            "teachers": {name: teachers[name] for name in used},
            "data": data,
            "options": options,
            "identity": identity,
            "session": session,
            "gpu": resources.gpus != 0,
            "split": resources if placement == "per_teacher" else None,
        },
        resources=resources if placement == "colocated" else unit_resources(resources),
        starts=Attempts(storage.join(out, "progress", "starts", "recover"), session, ""),
    )


def recover_rows(units: Sequence[RecoverUnit]) -> list[Row]:
    """Rows of the units, longest first: a long unit that starts last would keep one worker busy alone."""

    def cost(unit: RecoverUnit) -> int:
        return unit.iterations * len(unit.classes) * len({*unit.logit_teachers, *unit.bn_teachers})

    ordered = sorted(units, key=lambda unit: (-cost(unit), unit.id))
    return [{"id": unit.id, "error": "", "unit": unit.model_dump_json()} for unit in ordered]


def folders(out: str, options: RecoverOptions) -> list[str]:
    """Folders in each of which a unit has a shard, in the order of commits."""
    return [storage.join(out, name) for name in (["init"] if options.init == "real" else []) + ["recovered"]]


def unit_key(unit: RecoverUnit, identity: str) -> str:
    """Digest of what a unit's shards hold."""
    return content_key(_content(unit), identity)


def is_committed(out: str, unit: RecoverUnit, identity: str) -> bool:
    """Whether a unit's shards are there, whole, and of this run."""
    wanted = [_recovered_uri(out, unit)] + ([_init_uri(out, unit)] if unit.sources else [])
    for uri in wanted:
        found = shards.shard_metadata(uri) or {}
        mine = found.get("identity") == identity and found.get("unit") == _content(unit)
        if not mine or found["num_rows"] != len(unit.classes):
            return False
    return True


def _content(unit: RecoverUnit) -> dict[str, Any]:
    """The unit as it stands in a shard's metadata; its sources follow from the data, hence from the identity."""
    return unit.model_dump(mode="json", exclude={"sources"})


def _init_uri(out: str, unit: RecoverUnit) -> str:
    return storage.join(out, "init", f"{unit.id}.parquet")


def _recovered_uri(out: str, unit: RecoverUnit) -> str:
    return storage.join(out, "recovered", f"{unit.id}.parquet")


def _state_uri(out: str, unit: RecoverUnit) -> str:
    return storage.join(out, "progress", "state", f"{unit.id}.safetensors")
