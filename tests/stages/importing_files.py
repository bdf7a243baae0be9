"""Small images, trees of them, and what an import made of them: for the tests of every format."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from cluster import shards
from cluster.runner import run_serial
from stages.images import to_pixels
from stages.importing import import_dataset
from stages.importing.detect import open_source


def encoded(pixels: np.ndarray, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def random_images(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((size, size))) for c in coarse])


def do_import(src: Path | str, dst: Path | str, **options):
    source = open_source(str(src), options.pop("format", "auto"))
    return import_dataset(source, str(dst), runner=run_serial, **options)


def rows_of(uri: Path | str) -> list[dict]:
    dataset = shards.load_dataset(str(uri))
    return [row for u in dataset.shard_uris() for row in shards.read_shard(u).to_pylist()]


def pixels_of(row: dict, channels: int = 3) -> np.ndarray:
    size = Image.open(io.BytesIO(row["image"]["bytes"])).size[0]
    return to_pixels(row["image"]["bytes"], size, channels)


def write_tree(root: Path, classes: dict[str, list[bytes]], suffix: str = ".png") -> None:
    for name, images in classes.items():
        (root / name).mkdir(parents=True)
        for index, data in enumerate(images):
            (root / name / f"{index:02d}{suffix}").write_bytes(data)
