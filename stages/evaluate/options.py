"""Settings of student training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from cluster.resources import Frozen
from stages.recover.options import UNSAID_PRECISION, Precision
from stages.teachers.options import NetworkSpec

StudentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$")]
"""Appears in results and file names."""


class Protocol(Frozen):
    """How a student is trained.

    Attributes:
        name: appears in results and file names.
        loss: ``mse_ce`` = MSE(student, teacher logits) + ce_weight · CE(hard label of the un-mixed image);
            ``kl`` = KL(teacher ‖ student) at ``temperature``, batch mean, not multiplied by T²; ``ce`` = hard
            labels alone, of both partners of a mixed view by their shares.
        ce_weight, temperature: weight and temperature in ``loss``.
        optimizer, lr, momentum, weight_decay: weight decay acts on weights alone, not on biases and norms.
        batch: any, independent of the labels'.
        schedule: ``cosine``; ``smoothed_cosine`` = ½(1 + cos(πt / (zeta·T))); ``ssrs`` = smoothed cosine up
            to 5/6 of training, then straight to 0 (EDC).
        zeta: stretch of the last two.
        ema: decay of averaged weights that are evaluated instead; None = off.
        val_every: epochs between validations; the last epoch always counts.
        precision: of the student's passes, in training and in validation: ``fp32``; ``tf32`` = GPUs round the factors
            of convolutions to 10 bits, as torch does by itself, CPUs compute float32; ``bf16`` = bfloat16, in which
            CPUs are slow at depthwise convolutions. Weights, losses and the optimiser are float32.
    """

    name: str = Field(default="default", pattern=r"^[A-Za-z0-9_.]+$")
    loss: Literal["mse_ce", "kl", "ce"] = "mse_ce"
    ce_weight: float = Field(default=0.1, ge=0)
    temperature: float = Field(default=20.0, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    batch: int = Field(default=50, ge=2)
    schedule: Literal["cosine", "smoothed_cosine", "ssrs"] = "ssrs"
    zeta: float = Field(default=2.5, ge=1)
    ema: float | None = Field(default=None, gt=0, lt=1)
    val_every: int = Field(default=10, ge=1)
    precision: Precision = UNSAID_PRECISION


class EvaluateOptions(Frozen):
    """Which students, how, and against what.

    Attributes:
        students: name → architecture.
        seeds: one student each.
        protocol: how they are trained.
        baselines: ``random_real`` = random real images, same IPC, same labelling and protocol;
            ``hard_label`` = the distilled images with their hard labels alone (loss ``ce`` on the same
            views), otherwise the same protocol.
        draws: of random real images, each with labels of its own: the students of ``seeds`` take turns, the k-th is
            trained on draw k mod ``draws``. With one for all, the baseline is as good or bad as that draw.
    """

    students: dict[StudentName, NetworkSpec] = {}
    seeds: list[int] = [0, 1, 2]
    protocol: Protocol = Protocol()
    baselines: list[Literal["random_real", "hard_label"]] = ["random_real", "hard_label"]
    draws: int = Field(default=1, ge=1)

    @property
    def real_draws(self) -> dict[int, list[int]]:
        """Draw of the baseline ``random_real`` → seeds of its students; empty without the baseline."""
        if "random_real" not in self.baselines:
            return {}
        return {draw: self.seeds[draw :: self.draws] for draw in range(min(self.draws, len(self.seeds)))}
