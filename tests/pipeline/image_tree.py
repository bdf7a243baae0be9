"""A small ImageFolder tree that networks can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_tree(root: Path, classes: list[str], per_class: dict[str, int], size: int = 16) -> Path:
    """An ImageFolder tree of coloured noise: class k is brighter in one channel, so it can be learnt."""
    rng = np.random.default_rng(0)
    for split, count in per_class.items():
        for index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
                pixels[:, :, index % 3] += 40 + 20 * (index // 3)
                Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root
