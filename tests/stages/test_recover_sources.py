"""Reading single rows of image shards from an object store."""

from __future__ import annotations

import uuid

import numpy as np
import pyarrow as pa
import pytest
import s3fs

from cluster import shards, storage
from stages.data import DataSpec
from stages.images import encode_png
from stages.recover.sources import SourceReader


@pytest.mark.s3
def test_a_row_costs_its_row_group_alone(s3_server, monkeypatch):
    uri = f"{s3_server}/{uuid.uuid4().hex}"
    pixels = np.random.default_rng(0).integers(0, 256, (100, 3, 64, 64), dtype=np.uint8)
    rows = [{"image": {"bytes": encode_png(x), "path": f"{k}.png"}, "label": k % 2} for k, x in enumerate(pixels)]
    name = "part-00000.parquet"
    table = pa.Table.from_pylist(rows, schema=shards.image_schema(["a", "b"]))
    size = shards.write_shard(storage.join(uri, name), table, row_group_size=5)
    shards.save_dataset(
        shards.Dataset(uri, ["a", "b"], 3, (64, 64), [0.5] * 3, [0.2] * 3, [(name, 100)], [50, 50], "fingerprint")
    )
    reader = SourceReader(shards.load_dataset(uri), DataSpec(64, 3, (0.5,) * 3, (0.2,) * 3, ("a", "b")))
    fetched: list[int] = []
    real = s3fs.core.S3File._fetch_range

    def counting(self, start, end):
        fetched.append(end - start)
        return real(self, start, end)

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counting)
    found = reader.read([(0, 42)], [0])
    assert np.array_equal(found.pixels[0].numpy(), pixels[42])
    assert len(fetched) == 2  # the footer and the row group
    assert sum(fetched) < 70_000 + size / 15
    # Its neighbours are there already.
    reader.read([(0, 40), (0, 44)], [0, 0])
    assert len(fetched) == 2
