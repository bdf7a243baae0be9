"""The students to train: one job each."""

from __future__ import annotations

import hashlib
import json

from pydantic import Field

from cluster.resources import Frozen
from stages.evaluate.options import EvaluateOptions, Protocol, StudentName
from stages.recover.options import leave_out_unsaid
from stages.teachers.arch import code_sha256, portable_arch
from stages.teachers.options import NetworkSpec

HARD_LABEL = "hard_label"


def student_id(method: str, student: str, protocol: str, seed: int) -> str:
    """``METHOD--STUDENT--PROTOCOL--sSEED``, safe as a file name."""
    return f"{method}--{student}--{protocol}--s{seed}"


class StudentJob(Frozen):
    """One student of one method with one seed.

    Attributes:
        method: what made the images and labels; the recipe's name, ``random_real`` or ``hard_label``.
        recipe: of the run.
        student: name of the architecture in ``evaluate.students``.
        network: the architecture.
        code_sha256: of the user's file with the architecture; None for libraries' ones.
        protocol: how it is trained.
        seed: of its initial weights.
        images_uri: folder of recovered shards.
        labels_uri: folder of label shards.
        epochs: label epochs = training epochs.
        ipc: images per class.
        inputs_sha: hash of all that determined images and labels.
        workers: that train it together; each takes its BN statistics from its own share of a batch.
        draw: of random real images.
    """

    method: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    recipe: str
    student: StudentName
    network: NetworkSpec
    code_sha256: str | None = None
    protocol: Protocol
    seed: int
    images_uri: str
    labels_uri: str
    epochs: int = Field(ge=1)
    ipc: int = Field(ge=1)
    inputs_sha: str
    workers: int = Field(default=1, ge=1)
    draw: int = Field(default=0, ge=0)

    @property
    def id(self) -> str:
        """See ``student_id``."""
        return student_id(self.method, self.student, self.protocol.name, self.seed)

    @property
    def content_sha(self) -> str:
        """Hash of what the result depends on: everything but the places of the run and of a user's code."""
        content = self.model_dump(mode="json", exclude={"images_uri", "labels_uri"})
        content["network"]["arch"] = portable_arch(self.network.arch)
        # What it was before there were several draws stays valid.
        if not self.draw:
            del content["draw"]
        leave_out_unsaid(content["protocol"])
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def val_epochs(self) -> list[int]:
        """Epochs (from 1) after which the student is validated."""
        return [e for e in range(1, self.epochs + 1) if e == self.epochs or e % self.protocol.val_every == 0]


def plan_jobs(
    options: EvaluateOptions,
    method: str,
    *,
    recipe: str,
    images_uri: str,
    labels_uri: str,
    epochs: int,
    ipc: int,
    inputs_sha: str,
    workers: int = 1,
    draw: int = 0,
) -> list[StudentJob]:
    """Jobs of one method: every student with every seed.

    The method ``hard_label`` gets the views of the label shards and the loss ``ce``, whatever the protocol's.
    """
    protocol = options.protocol
    if method == HARD_LABEL:
        protocol = protocol.model_copy(update={"loss": "ce"})
    return [
        StudentJob(
            method=method,
            recipe=recipe,
            student=name,
            network=network,
            code_sha256=code_sha256(network.arch),
            protocol=protocol,
            seed=seed,
            images_uri=images_uri,
            labels_uri=labels_uri,
            epochs=epochs,
            ipc=ipc,
            inputs_sha=inputs_sha,
            workers=workers,
            draw=draw,
        )
        for name, network in options.students.items()
        for seed in options.seeds
    ]
