"""Recovery as a pipeline stage: an actor that keeps its teachers for life and commits one shard per unit."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from cluster import shards, storage
from cluster.errors import RunError
from cluster.ledger import content_key
from cluster.progress import ProgressWriter
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row
from stages.data import DataSpec
from stages.device import pick_device
from stages.images import encode_png
from stages.recover.core import recover_unit
from stages.recover.options import RecoverOptions
from stages.recover.sources import SourceReader
from stages.recover.unit import RecoverUnit
from stages.teachers.options import TeacherSpec
from stages.teachers.teacher import load_teacher

# Ray restarts a worker that was killed, for want of memory above all, without end. After so many starts
# in one run the unit is reported as failed instead.
MAX_ATTEMPTS = 3


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
    ):
        self.device = pick_device(gpu)
        # Channels-last weights make convolutions lay out their activations likewise: a fifth faster on CPUs.
        self.teachers = {
            name: load_teacher(name, spec, data, self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for name, spec in teachers.items()
        }
        self.out, self.data, self.options = out, data, options
        self.identity, self.session = identity, session
        real = options.init == "real"
        self.reader = SourceReader(shards.load_dataset(train_uri), data) if real else None

    def __call__(self, row: Row) -> Row:
        """Recover and commit a unit.

        Returns:
            ``id``, ``error``, ``seconds``, ``images``, ``loss_ce``, ``iterations``, ``attempt`` (starts, over all runs)
            and ``sizes`` (bytes of the shards in ``folders``).

        Raises:
            RunError: see ``recover_unit``; or the unit's worker was killed too often.
        """
        start = time.monotonic()
        unit = RecoverUnit.model_validate_json(row["unit"])
        progress, attempts = self._begin(unit)
        names: list[str | None] = [None] * len(unit.classes)
        images, sizes = None, []
        if self.reader:
            sources = self.reader.read(unit.sources, unit.classes)
            names = list(sources.names)
            images = self.data.normalise(sources.pixels)
            sizes.append(self._commit(_init_uri(self.out, unit), unit, sources.pixels, names, {}))
        result = recover_unit(
            unit,
            images,
            self.teachers,
            self.options,
            self.data,
            self.device,
            on_step=lambda done, total: progress.update(done, total, unit.id, **attempts),
        )
        outcome = {
            "logit_teacher": ",".join(unit.logit_teachers),
            "bn_teachers": list(result.loss_bn),
            "loss_ce": result.loss_ce,
            "loss_bn": list(result.loss_bn.values()),
            "iterations": result.iterations,
        }
        recovered = _recovered_uri(self.out, unit)
        sizes.append(self._commit(recovered, unit, result.pixels, names, outcome, log=result.log))
        return {
            "id": unit.id,
            "error": "",
            "seconds": time.monotonic() - start,
            "images": len(unit.classes),
            "loss_ce": result.loss_ce,
            "iterations": result.iterations,
            "attempt": attempts["attempt"],
            "sizes": sizes,
        }

    def _begin(self, unit: RecoverUnit) -> tuple[ProgressWriter, dict[str, Any]]:
        """Record the start of an attempt before anything can kill it."""
        uri = storage.join(self.out, "progress", "recover")
        progress = ProgressWriter(uri, unit.id, interval_s=5.0)
        last: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            last = storage.read_json(storage.join(uri, f"{unit.id}.json"))
        here = last["session_attempt"] + 1 if last.get("session") == self.session else 1
        if here > MAX_ATTEMPTS:
            raise RunError(
                f"unit {unit.id} (seed {unit.seed}) lost its worker {MAX_ATTEMPTS} times, most likely for want of "
                "memory; lower resources.recover.actors or recover.chunk"
            )
        attempts = {"attempt": last.get("attempt", 0) + 1, "session": self.session, "session_attempt": here}
        progress.update(0, unit.iterations, unit.id, force=True, **attempts)
        return progress, attempts

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
) -> ActorStage:
    """The stage for a runner.

    Args:
        out: run directory.
        train_uri: the real data.
        teachers: all of the run, with ``weights`` set; only those that recovery uses are loaded.
        data: image space.
        options: of recovery.
        identity: what the images depend on, in one string.
        resources: of one actor and the pool.
    """
    used = dict.fromkeys([*options.logit_teachers, *options.bn_teachers])
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
            "session": uuid.uuid4().hex,
            "gpu": resources.gpus != 0,
        },
        resources=resources,
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
