"""A teacher's card: what a run must know of it, beside its weights in ``teachers/NAME/``."""

from __future__ import annotations

import posixpath
from typing import Any

from pydantic import ValidationError

from cluster import storage
from cluster.errors import UserError
from cluster.resources import Frozen

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "card.json"


class TeacherCard(Frozen):
    """Facts about one teacher.

    Attributes:
        arch, kwargs: architecture.
        num_outputs: classes of the network.
        class_names: of the network in output order; None where it knows more classes than the data name.
        class_index: data class → output, where the network's classes are not the data's.
        input_size, resize, mean, std: what it takes (see ``TeacherSpec``).
        bn_channels: channels of each BatchNorm2d layer in ``modules()`` order.
        parameters: number of weights.
        train_top1, val_top1: fraction right among the data's classes, on ``train_images`` (evenly spread) and all
            validation images; None where not measured.
        val_top1_all: fraction right among all outputs of the network.
        train_images, val_images: images those were measured on.
        sha256: of the weights file.
        origin: ``squeeze`` or the weights' URI.
        origin_sha256: of the file that the weights were taken from; None where there was none.
        settings_sha256: of what the training of a squeezed teacher was asked for (``TeacherJob.settings``).
        code_sha256: of the user's file with the architecture; None for libraries' ones.
    """

    arch: str
    kwargs: dict[str, Any]
    num_outputs: int
    class_names: list[str] | None
    class_index: dict[str, int] | None
    input_size: int
    resize: int
    mean: list[float]
    std: list[float]
    bn_channels: list[int]
    parameters: int
    train_top1: float | None
    val_top1: float | None
    val_top1_all: float | None
    train_images: int
    val_images: int
    sha256: str
    origin: str
    origin_sha256: str | None = None
    settings_sha256: str | None = None
    code_sha256: str | None = None

    @property
    def bn_layers(self) -> int:
        """Number of BatchNorm2d layers."""
        return len(self.bn_channels)


def write_card(folder: str, card: TeacherCard) -> None:
    """Commit a card; it is written after the weights, so its presence says that the teacher is complete."""
    storage.write_json(storage.join(folder, CARD_FILE), {**card.model_dump(mode="json"), "bn_layers": card.bn_layers})


def read_card(folder: str) -> TeacherCard | None:
    """The card in a teacher's folder, None where there is none.

    Raises:
        UserError: it is damaged.
    """
    where = storage.join(folder, CARD_FILE)
    try:
        value = storage.read_json(where)
        value.pop("bn_layers", None)
        return TeacherCard(**value)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, AttributeError, ValidationError):
        raise UserError(f"{where}: not a teacher's card; delete it or restore the file") from None


def card_beside(weights: str) -> TeacherCard | None:
    """The card of a weights file that stands in a teacher's folder of this program."""
    folder, _, name = weights.rpartition("/")
    return read_card(folder or ".") if posixpath.basename(name) == WEIGHTS_FILE else None
