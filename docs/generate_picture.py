"""Draws one image of every class of several image folders below each other: the pictures in ``docs/``.

Run it as ``PYTHONPATH=. python docs/generate_picture.py docs/cifar10.png runs/cifar10/init runs/cifar10/recovered``.
"""

from __future__ import annotations

import io
import sys

from PIL import Image

from cluster import shards, storage

# Side of an image in the picture, and the gap between two, in pixels.
SIDE, GAP = 80, 4


def first_of_every_class(uri: str) -> list[Image.Image]:
    """The first image of every class, in label order."""
    found: dict[int, Image.Image] = {}
    for file in storage.list_files(uri, ".parquet"):
        table = shards.read_shard(storage.join(uri, file), columns=["image", "label"])
        for image, label in zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True):
            if label not in found:
                found[label] = Image.open(io.BytesIO(image["bytes"])).convert("RGB")
    return [image for _, image in sorted(found.items())]


def picture(uris: list[str]) -> Image.Image:
    """A row for every folder, a column for every class."""
    rows = [first_of_every_class(uri) for uri in uris]
    step = SIDE + GAP
    canvas = Image.new("RGB", (step * len(rows[0]) - GAP, step * len(rows) - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            canvas.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x * step, y * step))
    return canvas


if __name__ == "__main__":
    picture(sys.argv[2:]).save(sys.argv[1], optimize=True)
