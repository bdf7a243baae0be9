"""What is to be done for one teacher, what identifies it, and where a finished one lives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from cluster import storage
from cluster.errors import UserError
from cluster.resources import Frozen, Settled
from cluster.version import __version__
from stages.data import DataSpec
from stages.squeeze.options import SqueezeOptions
from stages.teachers.accuracy import Accuracy
from stages.teachers.arch import code_sha256, portable_arch
from stages.teachers.card import CARD_FILE, WEIGHTS_FILE, TeacherCard, read_card, write_card
from stages.teachers.options import PRETRAINED, TeacherSpec
from stages.teachers.teacher import Teacher
from stages.teachers.weights import read_weights_bytes, save_weights

# Origin of a teacher that was trained here.
SQUEEZED = "squeeze"


class TeacherJob(Frozen):
    """One teacher that has no card yet.

    Attributes:
        name: of the teacher.
        spec: what is asked for; with weights it is adopted, without it is trained.
        epochs, lr: of its training.
        settings: see ``settings_digest``.
        key: identifies the result of the training, by ``settings`` and by what decides on the last bits: equal keys
            give equal weights (on equal CPUs, where ``threads`` is left to the machine).
    """

    name: str
    spec: TeacherSpec
    epochs: int
    lr: float
    settings: str
    key: str

    @property
    def steps(self) -> int:
        """Its share of the progress: epochs; an adoption counts as one."""
        return 1 if self.spec.weights is not None else self.epochs


def teacher_folder(out_uri: str, name: str) -> str:
    """``OUT/teachers/NAME``."""
    return storage.join(out_uri, "teachers", name)


def plan_job(
    name: str,
    spec: TeacherSpec,
    options: SqueezeOptions,
    data: DataSpec,
    fingerprints: list[str],
    seed: int,
    settled: Settled,
) -> TeacherJob:
    """The job of a teacher.

    Args:
        name: of the teacher; its random numbers come from it.
        spec: what is asked for.
        options: of all trainings.
        data: the space of the images.
        fingerprints: of the training and the validation data.
        seed: of the run.
        settled: what the training will have; the order of sums depends on it.
    """
    settings = settings_digest(name, spec, options, data, fingerprints[0], seed)
    result = {
        "settings": settings,
        "val": fingerprints[1],
        "workers": settled.workers,
        "threads": settled.threads,
        # Decides on the kernels, and on what precision ``auto`` is.
        "gpu": settled.gpus > 0,
        "version": __version__,
    }
    epochs, lr = spec.epochs or options.epochs, spec.lr or options.lr
    return TeacherJob(name=name, spec=spec, epochs=epochs, lr=lr, settings=settings, key=_digest(result))


def settings_digest(
    name: str, spec: TeacherSpec, options: SqueezeOptions, data: DataSpec, fingerprint: str, seed: int
) -> str:
    """Hash of what a training is asked for.

    Args:
        name: of the teacher.
        spec: what is asked for.
        options: of all trainings.
        data: the space of the images.
        fingerprint: of the training data.
        seed: of the run.
    """
    settings = {
        "name": name,
        "network": {
            **spec.model_dump(mode="json", exclude={"weights", "key_map", "epochs", "lr"}),
            "arch": portable_arch(spec.arch),
        },
        "code": code_sha256(spec.arch),
        "squeeze": options.model_dump(mode="json", exclude={"cache", "epochs", "lr"}),
        "epochs": spec.epochs or options.epochs,
        "lr": spec.lr or options.lr,
        "data": asdict(data),
        "fingerprint": fingerprint,
        "seed": seed,
    }
    return _digest(settings)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_origin(out_uri: str, name: str, spec: TeacherSpec, settings: str) -> None:
    """Prove that a finished teacher was made from what is asked for; one that is not finished passes.

    A weights file that is no longer there proves nothing, and the run has its own copy. A user's code has to be there,
    for the run goes on with it.

    Args:
        out_uri: the run directory.
        name: of the teacher.
        spec: what is asked for.
        settings: of its training, see ``settings_digest``.

    Raises:
        UserError: it was made from other weights, settings or code.
    """
    folder = teacher_folder(out_uri, name)
    card = read_card(folder)
    if card is None:
        return
    weights = spec.weights
    if card.code_sha256 not in (None, code_sha256(spec.arch)):
        same, what = False, f"other code than {spec.arch} holds now"
    elif weights is None:
        same = card.origin == SQUEEZED and card.settings_sha256 in (None, settings)
        what = "other weights or settings than those of the configuration"
    else:
        sha256 = _origin_sha256(weights)
        given = card.origin == PRETRAINED if weights == PRETRAINED else card.origin not in (SQUEEZED, PRETRAINED)
        same = given and (sha256 is None or card.origin_sha256 in (None, sha256))
        what = f"other weights than {weights}"
    if not same:
        raise UserError(f"teachers.{name}: {folder} was made from {what}; choose another out")


def _origin_sha256(weights: str | None) -> str | None:
    """Of a given weights file; None where there is no such file."""
    if weights is None or weights == PRETRAINED or not storage.exists(weights):
        return None
    return hashlib.sha256(read_weights_bytes(weights)).hexdigest()


def commit(out_uri: str, job: TeacherJob, teacher: Teacher, train: Accuracy | None, val: Accuracy) -> None:
    """Write a teacher's weights, then its card, whose presence says that the teacher is complete.

    Args:
        out_uri: the run directory.
        job: of the teacher.
        teacher: with its final weights.
        train: its accuracy on training images, where measured.
        val: its accuracy on validation images.
    """
    folder = teacher_folder(out_uri, job.name)
    content = save_weights(storage.join(folder, WEIGHTS_FILE), teacher.network.state_dict())
    card = make_card(job, teacher, train, val, hashlib.sha256(content).hexdigest())
    write_card(folder, card)


def make_card(job: TeacherJob, teacher: Teacher, train: Accuracy | None, val: Accuracy, sha256: str) -> TeacherCard:
    """The card of a finished teacher; ``sha256`` is that of its weights file."""
    identity = teacher.outputs == list(range(teacher.num_outputs))
    return TeacherCard(
        arch=job.spec.arch,
        kwargs=job.spec.kwargs,
        num_outputs=teacher.num_outputs,
        class_names=teacher.class_names,
        class_index=None if identity else dict(zip(teacher.data.class_names, teacher.outputs, strict=True)),
        input_size=teacher.input_size,
        resize=teacher.resize,
        mean=teacher.mean,
        std=teacher.std,
        bn_channels=[layer.num_features for layer in teacher.bn_layers],
        parameters=_count(teacher.network),
        train_top1=train.top1 if train else None,
        train_images=train.images if train else 0,
        val_top1=val.top1,
        val_top1_all=val.top1_all,
        val_images=val.images,
        sha256=sha256,
        origin=job.spec.weights or SQUEEZED,
        origin_sha256=_origin_sha256(job.spec.weights),
        settings_sha256=job.settings if job.spec.weights is None else None,
        code_sha256=code_sha256(job.spec.arch),
    )


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def copy_teacher(source: str, target: str) -> bool:
    """Copy a complete teacher from one folder to another, the card last.

    Returns:
        False where ``source`` holds no complete teacher with the weights its card names.
    """
    try:
        card = read_card(source)
        content = read_weights_bytes(storage.join(source, WEIGHTS_FILE)) if card else b""
    except UserError:
        return False
    if card is None or hashlib.sha256(content).hexdigest() != card.sha256:
        return False
    storage.write_bytes(storage.join(target, WEIGHTS_FILE), content)
    storage.write_bytes(storage.join(target, CARD_FILE), storage.read_bytes(storage.join(source, CARD_FILE)))
    return True
