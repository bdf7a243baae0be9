"""What every stage needs to know of the run's images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.device import moved


@dataclass(frozen=True)
class DataSpec:
    """The common space of images, teachers and students.

    Attributes:
        image_size: side in pixels.
        channels: 3 = RGB, 1 = grey.
        mean, std: per channel, for pixels in [0, 1].
        class_names: in label order.
        resize: length to which the shorter side of a real image is brought before its centre of ``image_size``
            is taken; None: ``image_size``.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    resize: int | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_bytes(self) -> int:
        """Of a decoded image, uint8 [C, S, S]."""
        return self.channels * self.image_size**2

    def _column(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return moved(torch.tensor(values, dtype=like.dtype), like.device).view(1, -1, 1, 1)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, C, H, W] → float32, (p / 255 − mean) / std."""
        x = pixels.to(torch.float32) / 255.0
        return (x - self._column(self.mean, x)) / self._column(self.std, x)

    def denormalise(self, x: Tensor) -> Tensor:
        """Normalised float [B, C, H, W] → uint8, rounded to the nearest level and clamped."""
        pixels = (x * self._column(self.std, x) + self._column(self.mean, x)) * 255.0
        return pixels.round().clamp(0, 255).to(torch.uint8)

    def valid_range(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest normalised value of each channel, [1, C, 1, 1]: those of black and white."""
        mean, std = self._column(self.mean, like), self._column(self.std, like)
        return (0 - mean) / std, (1 - mean) / std
