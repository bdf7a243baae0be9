"""Settings of teacher training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.resources import Frozen


class SqueezeOptions(Frozen):
    """Supervised training of the teachers that have no weights.

    Attributes:
        epochs, batch, optimizer, lr, momentum, weight_decay, warmup_epochs: SGD with Nesterov momentum or AdamW,
            cosine to 0 after a linear warm-up; ``lr`` is for ``batch``.
        label_smoothing: of the cross-entropy.
        crop_padding: random crop after reflecting so many pixels on each side (small images).
        crop_min_scale: RandomResizedCrop's least area instead (large images); exclusive with crop_padding.
        flip: horizontal flips.
        precision: ``auto`` = bf16 autocast on GPUs, fp32 on CPUs.
        cache: URI of a folder of trained teachers, shared between runs and looked up by content (architecture,
            data, settings, seed, workers and threads).
    """

    epochs: int = Field(default=10, ge=1)
    batch: int = Field(default=128, ge=2)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    warmup_epochs: float = Field(default=1.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    crop_padding: int = Field(default=0, ge=0)
    crop_min_scale: float | None = Field(default=None, gt=0, le=1)
    flip: bool = True
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    cache: str | None = None

    @model_validator(mode="after")
    def _check(self) -> SqueezeOptions:
        if self.crop_padding and self.crop_min_scale is not None:
            raise ValueError("crop_padding and crop_min_scale exclude each other; leave one of them out")
        return self
