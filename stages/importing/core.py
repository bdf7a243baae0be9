"""One shard's worth of images: read, verify, measure."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from cluster.errors import PrismError
from cluster.shards import IMAGE_TYPE, image_schema
from stages.images import encode_png, open_image
from stages.importing.source import Reader

# MPO is what phones call a JPEG with a second picture behind it.
KEPT_FORMATS = ("JPEG", "MPO", "PNG")
GREY_MODES = ("1", "L")


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a shard without reading its images again. All sums are exact integers.

    Attributes:
        rows: images in it.
        class_counts: label → images.
        sums, squares: of the 8-bit values, per RGB channel (grey counts in all three).
        pixels: per channel.
        grey: every image has one channel.
        sizes: (height, width) of its images; at most two different ones, which already says "not constant".
        corrupt: (name, reason) of images that could not be read.
    """

    rows: int
    class_counts: dict[int, int]
    sums: list[int]
    squares: list[int]
    pixels: int
    grey: bool
    sizes: list[tuple[int, int]]
    corrupt: list[tuple[str, str]]

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> ShardRecord:
        """Inverse of ``to_json``, after a trip through JSON."""
        return ShardRecord(
            **{
                **value,
                "class_counts": {int(k): int(v) for k, v in value["class_counts"].items()},
                "sizes": [(int(h), int(w)) for h, w in value["sizes"]],
                "corrupt": [(str(n), str(r)) for n, r in value["corrupt"]],
            }
        )


def build_shard(
    keys: list[str], labels: list[int], read: Reader, class_names: list[str], metadata: dict[str, Any]
) -> tuple[pa.Table, ShardRecord]:
    """Read and decode every image; bytes of PNG and JPEG stay as they are, others become PNG.

    Args:
        keys: of the images; also the ``path`` that the shard names them by.
        labels: of the images.
        read: of the source.
        class_names: in label order.
        metadata: added to the shard's; the record joins it as ``record``.

    Returns:
        The shard (its readable images, in order), and its record.
    """
    levels = np.arange(256, dtype=np.int64)
    sums, squares, pixels = np.zeros(3, np.int64), np.zeros(3, np.int64), 0
    rows: list[dict[str, Any]] = []
    kept: list[int] = []
    sizes: set[tuple[int, int]] = set()
    corrupt: list[tuple[str, str]] = []
    all_grey = True
    for key, label, data in zip(keys, labels, read(keys), strict=True):
        try:
            encoded, image = _verify(data)
        except ValueError as error:
            corrupt.append((key, str(error)))
            continue
        grey = image.mode == "L"
        histogram = np.asarray(image.histogram(), np.int64).reshape(-1, 256)
        # Broadcasts the one channel of a grey image to three.
        sums += histogram @ levels
        squares += histogram @ levels**2
        pixels += image.width * image.height
        all_grey &= grey
        if len(sizes) < 2:
            sizes.add((image.height, image.width))
        rows.append({"bytes": encoded, "path": key})
        kept.append(label)
    record = ShardRecord(
        rows=len(rows),
        class_counts=dict(sorted(Counter(kept).items())),
        sums=sums.tolist(),
        squares=squares.tolist(),
        pixels=pixels,
        grey=all_grey,
        sizes=sorted(sizes),
        corrupt=corrupt,
    )
    schema = image_schema(class_names, metadata={**metadata, "record": record.to_json()})
    table = pa.table([pa.array(rows, IMAGE_TYPE), pa.array(kept, pa.int64())], schema=schema)
    return table, record


def _verify(data: bytes | Exception) -> tuple[bytes, Image.Image]:
    """(bytes to store, decoded image in mode L or RGB).

    Raises:
        ValueError: no image, with the reason.
        PrismError: the storage failed, which says nothing about the image.
    """
    if isinstance(data, PrismError):
        raise data
    if isinstance(data, Exception):
        raise ValueError(getattr(data, "strerror", None) or str(data) or type(data).__name__)
    if not data:
        raise ValueError("the file is empty")
    image = open_image(data)
    form = image.format
    image = image.convert("L" if image.mode in GREY_MODES else "RGB")
    if form in KEPT_FORMATS:
        return data, image
    pixels = np.asarray(image, np.uint8)
    return encode_png(pixels[None] if image.mode == "L" else pixels.transpose(2, 0, 1)), image
