"""Settings of relabelling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.resources import Frozen
from stages.recover.options import UNSAID_PRECISION, Crop, Precision


class Mix(Frozen):
    """Mixing of two views, λ ~ Beta(alpha, alpha) for each image (commonly CutMix 1.0, MixUp 0.8)."""

    kind: Literal["none", "cutmix", "mixup"] = "cutmix"
    alpha: float = Field(default=1.0, gt=0)


class RelabelOptions(Frozen):
    """Which teachers label which views.

    Attributes:
        teachers: names whose logits are combined; the first is the primary.
        ensemble: ``mean`` of logits; ``frobenius_mean`` = each teacher's batch scaled to the mean Frobenius
            norm first (G-VBSM, PRISM with ResNet-18); ``primary_half`` = ½ primary + ½ mean of the others,
            each row rescaled to the batch's mean L2 norm (PRISM with ResNet-50/101); ``prior_softmax`` =
            weights softmax(prior / 10) (CV-DD).
        priors: teacher → prior in percent, for ``prior_softmax``.
        epochs: label epochs = training epochs of the students.
        batch: rows over which the ensemble's norms are taken; students may train with any batch size.
        crop, flip: view of an image: RandomResizedCrop and flip with chance ½.
        precision: of the teachers' passes: ``fp32``; ``tf32`` = GPUs round the factors of convolutions to 10 bits, as
            torch does by itself, CPUs compute float32; ``bf16`` = bfloat16. Views and the ensemble stay float32.
    """

    teachers: list[str] = []
    ensemble: Literal["mean", "frobenius_mean", "primary_half", "prior_softmax"] = "frobenius_mean"
    priors: dict[str, float] = {}
    mix: Mix = Mix()
    epochs: int = Field(default=300, ge=1)
    batch: int = Field(default=50, ge=1)
    crop: Crop = Crop(min_scale=0.25)
    flip: bool = True
    precision: Precision = UNSAID_PRECISION
