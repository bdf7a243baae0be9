"""How a configuration names a network and its weights."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from cluster.resources import Frozen

# Weights of the library that names the architecture.
PRETRAINED = "pretrained"


class KeyMap(Frozen):
    """How foreign weight names become this architecture's.

    Attributes:
        state_key: entry of the file that holds the state dict (``state_dict``), where it is not the top level.
        strip_prefix: removed from the front of every name (``module.``).
        rename: [regular expression, replacement] pairs, applied in order to every name (``re.sub``).
        ignore_missing: regular expressions of names that the file may lack.
        ignore_unexpected: regular expressions of names in the file to drop.
    """

    state_key: str | None = None
    strip_prefix: str = ""
    rename: list[tuple[str, str]] = []
    ignore_missing: list[str] = [r"num_batches_tracked$"]
    ignore_unexpected: list[str] = []


class NetworkSpec(Frozen):
    """An architecture.

    Attributes:
        arch: ``builtin:NAME``, ``timm:NAME``, ``torchvision:NAME``, or ``user:package.module:factory`` /
            ``user:path/file.py:factory`` for an importable function that returns an ``nn.Module``.
        kwargs: passed to the factory beside ``num_classes`` (and ``in_chans`` for built-in and timm networks).
    """

    arch: str
    kwargs: dict[str, Any] = {}


class TeacherSpec(NetworkSpec):
    """A teacher: an architecture, and weights that are given or will be trained by ``squeeze``.

    Attributes:
        weights: local path or ``s3://`` of a safetensors or ``weights_only`` torch file; ``pretrained`` for
            the ones timm names for the architecture, or torchvision's IMAGENET1K_V1 (which the published methods
            use); None: trained by ``squeeze``.
        key_map: how the file's names map to the architecture's.
        num_outputs: classes of the network where it knows more than the data's (1000 for ImageNet weights).
        class_index: data class name → output of the network, where the network's classes are not the data's in
            order. Its logits are reduced to the data's classes in the data's order.
        class_names: the network's own class names in output order, checked against the data's.
        mean, std: per-channel normalisation that the network expects. None: the one its card or the pretrained
            weights' own configuration states, else the data's.
        input_size: side that the network expects; images of another size are resized on the way in. None: as
            with mean.
        resize: side to which images are resized before their centre of ``input_size`` is cut out. None:
            ``input_size``, nothing is cut off.
        epochs, lr: override ``squeeze`` for this teacher.
    """

    weights: str | None = None
    key_map: KeyMap = KeyMap()
    num_outputs: int | None = Field(default=None, ge=2)
    class_index: dict[str, int] | None = None
    class_names: list[str] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    input_size: int | None = Field(default=None, ge=8)
    resize: int | None = Field(default=None, ge=8)
    epochs: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> TeacherSpec:
        if self.weights is None and (self.num_outputs is not None or self.class_index is not None):
            raise ValueError(
                "num_outputs and class_index are for given weights; leave them out to train it on the data's classes"
            )
        return self
