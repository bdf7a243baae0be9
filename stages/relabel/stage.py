"""The relabel pipeline: a stage per teacher adds its logits to a row, the last one combines and commits.

Only logits travel between actors. Every teacher stage holds the images and draws the views itself: a view is
a function of (seed, epoch), while pixels would be many times larger than what they are turned into.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster import shards, storage
from cluster.attempts import Attempts
from cluster.errors import RunError
from cluster.ledger import content_key
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row
from stages.data import DataSpec
from stages.device import autocast, pick_device, reproducible
from stages.imageset import load_image_set
from stages.relabel.ensemble import combine
from stages.relabel.options import RelabelOptions
from stages.relabel.store import shard_uri, write_labels
from stages.relabel.unit import LabelUnit
from stages.relabel.views import draw_views, render_views
from stages.teachers.options import TeacherSpec
from stages.teachers.teacher import load_teacher

# Images of one forward pass; larger label batches are forwarded in parts, to bound the memory.
MAX_FORWARD = 256


class TeacherStage:
    """Adds one teacher's logits to a row: ``logits_NAME``, float32 [rows, C].

    Args:
        name: of the teacher.
        spec: with ``weights`` set.
        images_uri: folder of recovered shards.
        data: image space.
        options: views and label batch.
        seed: of the run.
        gpu: use the actor's GPU where it has one.
    """

    def __init__(
        self,
        name: str,
        spec: TeacherSpec,
        images_uri: str,
        data: DataSpec,
        options: RelabelOptions,
        seed: int,
        gpu: bool,
    ):
        self.device = pick_device(gpu)
        self.name, self.data, self.options, self.seed, self.images_uri = name, data, options, seed, images_uri
        self.images = load_image_set(images_uri, data).images_near(self.device)
        self.teacher = load_teacher(name, spec, data, self.device)

    def __call__(self, row: Row) -> Row:
        """Label a unit.

        Raises:
            RunError: the unit was planned for another number of images, or a logit is not finite.
        """
        unit = LabelUnit.model_validate_json(row["unit"])
        if unit.num_images != len(self.images):
            raise RunError(
                f"{self.images_uri}: {len(self.images)} images where the plan has {unit.num_images}; "
                "run the stage that makes them again"
            )
        logits = self.label(unit)
        if not np.isfinite(logits).all():
            raise RunError(f"teacher {self.name} gives logits that are not finite; check teachers.{self.name}")
        return {**row, _column(self.name): logits}

    def label(self, unit: LabelUnit) -> NDArray[np.float32]:
        """Logits [unit.num_rows, C]; every label batch is forwarded alike, whatever unit it is in."""
        with (
            reproducible(self.options.precision),
            torch.inference_mode(),
            autocast(self.device, self.options.precision),
        ):
            return self._label(unit).cpu().numpy()

    def _label(self, unit: LabelUnit) -> Tensor:
        epoch, views, done = -1, None, 0
        # They stay on the device until all are there: a GPU that is waited for has nothing to do next.
        out = torch.empty((unit.num_rows, self.data.num_classes), device=self.device)
        for at_epoch, start, stop in unit.batches(self.options.batch):
            if views is None or at_epoch != epoch:
                epoch = at_epoch
                views = draw_views(self.seed, epoch, unit.num_images, self.data.image_size, self.options)
            ids = views.order[start:stop]
            for first in range(0, len(ids), MAX_FORWARD):
                x = render_views(self.images, views, ids[first : first + MAX_FORWARD], self.data, self.device)
                out[done : done + len(x)] = self.teacher(x)
                done += len(x)
        return out


class CommitStage:
    """Combines the teachers' logits of a row and commits its label shard.

    Args:
        labels_uri: folder of the label shards.
        data: image space.
        options: ensemble, views and label batch.
        seed: of the run.
        identity: what the labels depend on, in one string; a shard of another identity is redone.
    """

    def __init__(self, labels_uri: str, data: DataSpec, options: RelabelOptions, seed: int, identity: str):
        self.labels_uri, self.data, self.options, self.seed = labels_uri, data, options, seed
        self.metadata: dict[str, Any] = {
            "class_names": list(data.class_names),
            "teachers": options.teachers,
            "ensemble": options.ensemble,
            "relabel": options.model_dump(mode="json"),
            "seed": seed,
            "identity": identity,
        }

    def __call__(self, row: Row) -> Row:
        """Commit a unit; returns ``id``, ``error``, ``rows`` and ``sizes`` (bytes of its shard, one value).

        Raises:
            RunError: a combined logit exceeds the range of fp16.
        """
        unit = LabelUnit.model_validate_json(row["unit"])
        teachers = [row[_column(name)] for name in self.options.teachers]
        logits = np.empty(teachers[0].shape, np.float16)
        done = 0
        for _, start, stop in unit.batches(self.options.batch):
            part = slice(done, done + stop - start)
            # Copies, because what comes from another actor is read-only memory, which is not to be held twice.
            combined = combine([torch.from_numpy(z[part].copy()) for z in teachers], self.options)
            logits[part] = combined.to(torch.float16).numpy()
            done = part.stop
        if not np.isfinite(logits).all():
            raise RunError(f"{unit.id}: combined logits exceed ±65504, the range of fp16; check the teachers' weights")
        epochs = range(unit.epoch_start, unit.epoch_stop)
        size = write_labels(
            self.labels_uri,
            unit,
            [draw_views(self.seed, e, unit.num_images, self.data.image_size, self.options) for e in epochs],
            logits,
            self.options.batch,
            self.metadata,
        )
        return {"id": unit.id, "error": "", "rows": unit.num_rows, "sizes": [size]}


def _column(teacher: str) -> str:
    return f"logits_{teacher}"


def relabel_stages(
    labels_uri: str,
    images_uri: str,
    teachers: Mapping[str, TeacherSpec],
    data: DataSpec,
    options: RelabelOptions,
    seed: int,
    identity: str,
    resources: ActorResources,
    progress_uri: str,
) -> list[ActorStage]:
    """The stages of a relabel pipeline, for rows of ``relabel_rows``.

    Args:
        labels_uri: folder of the label shards to write.
        images_uri: folder of recovered shards to read, the distilled set or a baseline.
        teachers: name → specification with ``weights`` set; those of ``options.teachers`` are used.
        data: image space.
        options: which teachers label which views.
        seed: of the run.
        identity: what the labels depend on, in one string.
        resources: of each teacher's actors.
        progress_uri: folder of start records.
    """
    common = {"data": data, "options": options, "seed": seed}
    session = uuid.uuid4().hex
    labelling = [
        ActorStage(
            name=f"relabel-{name}",
            factory=TeacherStage,
            kwargs={
                "name": name,
                "spec": teachers[name],
                "images_uri": images_uri,
                "gpu": resources.gpus != 0,
                **common,
            },
            resources=resources,
            attempts=Attempts(
                storage.join(progress_uri, name),
                session,
                f"lower resources.relabel.actors or relabel with a smaller teacher than {name}",
                seed,
                key=identity,
            ),
        )
        for name in options.teachers
    ]
    commit = ActorStage(
        name="relabel-commit",
        factory=CommitStage,
        kwargs={"labels_uri": labels_uri, "identity": identity, **common},
        # Milliseconds a unit, no device; one actor keeps up with any number of teachers.
        resources=ActorResources(gpus=0, actors=1, threads=1),
    )
    return [*labelling, commit]


def relabel_rows(units: Sequence[LabelUnit]) -> list[Row]:
    """One row per unit."""
    return [{"id": unit.id, "error": "", "unit": unit.model_dump_json()} for unit in units]


def unit_key(unit: LabelUnit, identity: str) -> str:
    """Digest of what a unit's shard holds."""
    return content_key(unit.model_dump(), identity)


def is_committed(labels_uri: str, unit: LabelUnit, identity: str) -> bool:
    """Whether the unit's shard is whole and was made from the same inputs; reads its footer alone."""
    found = shards.shard_metadata(shard_uri(labels_uri, unit))
    return found is not None and (found.get("unit"), found.get("identity"), found["num_rows"]) == (
        unit.id,
        identity,
        unit.num_rows,
    )
