"""Settings of recovery; the names are those of the methods that differ in them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluster.resources import Frozen

Beta = Annotated[float, Field(ge=0, lt=1)]
"""Decay of one of Adam's averages."""
Placement = Literal["colocated", "per_teacher"]
"""Where the teachers of a unit live: with its pixels, or each in an actor of its own."""
Precision = Literal["fp32", "tf32", "bf16"]
"""float32; float32 with factors of convolutions rounded to 10 bits on GPUs; bfloat16 (autocast)."""

UNSAID_PRECISION: Precision = "tf32"
"""What torch does where nothing is said, as was done before there was a choice."""


def leave_out_unsaid(section: dict[str, Any]) -> None:
    """Take ``precision`` out of a section of plain values where nothing was said: what was made before stays valid."""
    if section["precision"] == UNSAID_PRECISION:
        del section["precision"]


class Stagger(Frozen):
    """Fewer steps for later indices (DELT, PRISM): T_i = iterations − drop · (i mod modulo)."""

    drop: int = Field(default=0, ge=0)
    modulo: int = Field(default=1, ge=1)


class Crop(Frozen):
    """RandomResizedCrop: least area, as a fraction; 1 switches the crop off."""

    min_scale: float = Field(default=0.08, gt=0, le=1)


class RecoverOptions(Frozen):
    """The recovery objective and its optimiser.

    L = mean over logit teachers of CE + r_bn · (1/|B|) · Σ_{z∈B} L_BN(z), per unit of ``chunk`` images.

    Attributes:
        ipc: images per class.
        logit_teachers: names that give the cross-entropy; PRISM has one, the primary.
        bn_teachers: the pool Z whose BatchNorm statistics are matched.
        selection: ``fixed`` = the whole pool always; ``per_index`` = a subset per IPC index, drawn before
            (pre-distillation); ``per_step`` = a fresh subset every step (intra-distillation); ``round_robin`` =
            at step t network t mod |pool| alone gives both losses (G-VBSM).
        include_prob: chance that a slot beyond the first is filled.
        max_bn_teachers: slots; the first holds the primary where it is in the pool.
        first_bn_multiplier: weight a of each network's first BN layer.
        var_weight: weight of the variance term (DWA), 1 in the others.
        bn_norm: ``none`` = as published, where wide and deep networks weigh more; ``per_layer`` = each layer's
            distance divided by √(its channels), so that layers count alike; ``per_teacher`` = each network's L_BN
            divided by Σ_l a_l √(channels of l), so that networks count alike.
        r_bn: weight of the BN loss.
        allow_null_bn: accept BN teachers without BatchNorm; they add 0 and count in the divisor, which is what
            the published PRISM code does with AlexNet.
        chunk: images a unit: one of each of so many classes at one IPC index (cross-class batches).
        init: ``real`` = the i-th real image of the class for IPC index i; ``noise`` = N(0, 1).
        iterations, stagger: steps T_i of index i.
        lr, betas: Adam, cosine to 0.
        crop, flip, roll: augmentation of each step: RandomResizedCrop, flip with chance ½, circular shift by up
            to ``roll`` pixels in y and x.
        batch_augment: ``batch`` = one crop, flip and shift for the whole batch (as published); ``image`` = one
            for each image.
        precision: ``fp32`` = the same bytes every time on the same machine; ``tf32`` = GPUs round the factors of
            convolutions to 10 bits; ``bf16`` = teachers compute in bfloat16. Statistics, losses and pixels are float32
            in any case.
        compile: run the teachers through ``torch.compile``: fewer passes over memory and less of it, for some minutes
            of compiling, once a machine. Pixels differ in their last bits.
        checkpoint_every: keep a unit's state after every so many steps, so that it goes on from there when its worker
            is lost; 0: upon a notice of preemption only. Changes no result.
    """

    ipc: int = Field(default=10, ge=1)
    logit_teachers: list[str] = []
    bn_teachers: list[str] = []
    selection: Literal["fixed", "per_index", "per_step", "round_robin"] = "per_index"
    include_prob: float = Field(default=0.5, ge=0, le=1)
    max_bn_teachers: int = Field(default=4, ge=1)
    first_bn_multiplier: float = Field(default=10.0, ge=0)
    var_weight: float = Field(default=1.0, ge=0)
    bn_norm: Literal["none", "per_layer", "per_teacher"] = "none"
    r_bn: float = Field(default=0.01, ge=0)
    allow_null_bn: bool = False
    chunk: int = Field(default=100, ge=1)
    init: Literal["noise", "real"] = "real"
    iterations: int = Field(default=4000, ge=1)
    stagger: Stagger = Stagger()
    lr: float = Field(default=0.05, gt=0)
    betas: tuple[Beta, Beta] = (0.5, 0.9)
    crop: Crop = Crop()
    flip: bool = True
    roll: int = Field(default=32, ge=0)
    batch_augment: Literal["batch", "image"] = "batch"
    precision: Precision = "fp32"
    compile: bool = False
    checkpoint_every: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> RecoverOptions:
        if self.stagger.drop * (self.stagger.modulo - 1) >= self.iterations:
            raise ValueError(
                f"stagger drops {self.stagger.drop} × {self.stagger.modulo - 1} steps from iterations = "
                f"{self.iterations}, which leaves none; lower stagger.drop or raise iterations"
            )
        return self
