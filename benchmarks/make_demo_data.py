"""Make the demo data that ship with the package: a class-balanced subset of MNIST in ``pipeline/demo/mnist``.

    python benchmarks/make_demo_data.py FOLDER_WITH_THE_FOUR_IDX_FILES [OUT [TRAINING_IMAGES TEST_IMAGES]]

The images are drawn by key, so the same files give the same bytes again.
"""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from cluster import rng, shards, storage
from stages.images import to_pixels
from stages.importing.core import build_shard
from stages.importing.describe import WrittenShard, describe_dataset
from stages.importing.detect import open_reader, open_source

OUT = Path(__file__).resolve().parents[1] / "pipeline" / "demo" / "mnist"
IMAGES_PER_SHARD = 2_500
SIZE_LIMIT = 6_000_000
PARQUET = {"compression": "zstd", "compression_level": 22, "use_dictionary": False, "write_statistics": False}


def smallest_png(encoded: bytes) -> bytes:
    """The same pixels in fewer bytes."""
    out = io.BytesIO()
    Image.fromarray(to_pixels(encoded, size=28, channels=1)[0]).save(out, format="PNG", optimize=True)
    return out.getvalue()


def main(src: str, out: str = str(OUT), train: str = "25000", val: str = "2000") -> None:
    images = {"train": int(train), "val": int(val)}
    source = open_source(src, "idx")
    read = open_reader("idx", source.uri)
    for split in source.splits:
        uri = storage.join(out, split.name)
        storage.remove(uri)
        labels = np.asarray(split.labels)
        chosen: list[int] = []
        for label in range(len(source.class_names)):
            members = np.flatnonzero(labels == label)
            draw = rng.generator(0, "demo-data", split.name, label)
            chosen += sorted(draw.permutation(members)[: images[split.name] // len(source.class_names)].tolist())
        written = []
        for index, start in enumerate(range(0, len(chosen), IMAGES_PER_SHARD)):
            keys = {split.keys[i].rpartition("/")[2]: split.keys[i] for i in chosen[start : start + IMAGES_PER_SHARD]}
            table, record = build_shard(
                list(keys),
                labels[chosen[start : start + IMAGES_PER_SHARD]].tolist(),
                lambda short, keys=keys: [smallest_png(data) for data in read([keys[k] for k in short])],
                source.class_names,
                {"source": "MNIST (Y. LeCun, C. Cortes, C. Burges), CC BY-SA 3.0"},
            )
            data = shards.table_bytes(table, **PARQUET)
            name = f"part-{index:05d}.parquet"
            storage.write_bytes(storage.join(uri, name), data)
            written.append(WrittenShard(name, record, hashlib.sha256(data).hexdigest()))
        shards.save_dataset(describe_dataset(uri, source.class_names, written))
    total = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
    print(f"{total:,} bytes in {out}")
    if total > SIZE_LIMIT:
        sys.exit(f"more than the limit of {SIZE_LIMIT:,}; take fewer images")


if __name__ == "__main__":
    main(*sys.argv[1:])
