"""Shards are what Hugging Face ``datasets`` reads and writes; datasets open or say why not."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cluster import shards, storage
from cluster.errors import UserError

NAMES = ["cat", "Dog", "ünïcode"]


def png(value: int, size: int = 4) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def image_table(count: int = 5) -> pa.Table:
    rows = [{"bytes": png(10 * i), "path": f"{i}.png"} for i in range(count)]
    columns = [pa.array(rows, shards.IMAGE_TYPE), pa.array([i % 3 for i in range(count)], pa.int64())]
    return pa.table(columns, schema=shards.image_schema(NAMES, metadata={"unit": 7}))


def recovered_table() -> pa.Table:
    count = 3
    values = {
        "image": [{"bytes": png(80 * i), "path": f"{i}.png"} for i in range(count)],
        "label": [0, 1, 2],
        "image_id": [3, 4, 5],
        "ipc": [1, 1, 1],
        "source_id": ["a.jpg", "b.jpg", "c.jpg"],
        "logit_teacher": ["resnet"] * count,
        "bn_teachers": [["resnet", "vgg"]] * count,
        "loss_ce": [0.5, 0.25, 0.125],
        "loss_bn": [[1.0, 2.0]] * count,
        "iterations": [100] * count,
        "unit_seed": [2**62] * count,
    }
    return pa.table(values, schema=shards.image_schema(NAMES, shards.RECOVERED_FIELDS))


@pytest.fixture
def hf_load(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def load(files):
        return datasets.load_dataset(
            "parquet", data_files={"train": files}, cache_dir=str(tmp_path / "hf"), split="train"
        )

    return load


def test_huggingface_loads_an_image_shard(tmp_path, hf_load):
    for index in range(2):
        shards.write_shard(str(tmp_path / f"part-{index}.parquet"), image_table())
    loaded = hf_load([str(tmp_path / f"part-{index}.parquet") for index in range(2)])
    assert type(loaded.features["image"]).__name__ == "Image"
    assert loaded.features["label"].names == NAMES
    assert len(loaded) == 10
    assert isinstance(loaded[6]["image"], Image.Image)
    assert np.asarray(loaded[6]["image"]).tolist() == np.full((4, 4, 3), 10).tolist()
    assert loaded.features["label"].int2str(loaded[6]["label"]) == "Dog"


def test_huggingface_loads_a_recovered_shard(tmp_path, hf_load):
    shards.write_shard(str(tmp_path / "unit.parquet"), recovered_table())
    loaded = hf_load([str(tmp_path / "unit.parquet")])
    assert set(loaded.features) == {field.name for field in shards.RECOVERED_FIELDS}
    assert loaded.features["label"].names == NAMES
    row = loaded[2]
    assert np.asarray(row["image"])[0, 0].tolist() == [160, 160, 160]
    assert (row["bn_teachers"], row["loss_bn"], row["unit_seed"]) == (["resnet", "vgg"], [1.0, 2.0], 2**62)
    assert loaded.features["ipc"].dtype == "int32"


def test_what_huggingface_writes_reads_back(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    written = datasets.Dataset.from_dict({"image": [{"bytes": png(9)}], "label": [1]}, features=features)
    written.to_parquet(str(tmp_path / "hf.parquet"))
    table = shards.read_shard(str(tmp_path / "hf.parquet"))
    ours = image_table(1)
    assert table.schema.field("image").type == ours.schema.field("image").type
    theirs = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert json.loads(ours.schema.metadata[b"huggingface"])["info"]["features"] == theirs


def test_equal_tables_are_equal_bytes_and_metadata_travels(tmp_path):
    assert shards.table_bytes(image_table()) == shards.table_bytes(image_table())
    uri = str(tmp_path / "x.parquet")
    size = shards.write_shard(uri, image_table())
    assert storage.list_files(str(tmp_path)) == {"x.parquet": size}
    assert shards.shard_metadata(uri) == {"class_names": NAMES, "unit": 7, "num_rows": 5}
    assert shards.read_shard(uri).equals(image_table(), check_metadata=False)
    assert shards.read_shard(uri, ["label"]).column_names == ["label"]


@pytest.mark.parametrize("cut", [0, 3, 100, -1])
def test_a_half_written_shard_is_no_shard(tmp_path, cut):
    uri = str(tmp_path / "x.parquet")
    storage.write_bytes(uri, shards.table_bytes(image_table())[:cut])
    assert shards.shard_metadata(uri) is None
    with pytest.raises(UserError, match=r"x\.parquet: not a readable Parquet file"):
        shards.read_shard(uri)


def test_a_flipped_bit_is_noticed(tmp_path):
    where = tmp_path / "shard.parquet"
    table = pa.table({"label": pa.array(range(1000), pa.int64())})
    shards.write_shard(str(where), table, use_dictionary=False)
    assert shards.read_shard(str(where)).equals(table)
    data = bytearray(where.read_bytes())
    data[data.index((500).to_bytes(8, "little"))] ^= 1
    where.write_bytes(data)
    with pytest.raises(UserError, match=r"shard\.parquet: not a readable Parquet file .*run again"):
        shards.read_shard(str(where))


@pytest.mark.parametrize("group", [1, 3, 5])
def test_rows_of_a_shard(tmp_path, group):
    uri = str(tmp_path / "shard.parquet")
    shards.write_shard(uri, image_table(), row_group_size=group)
    for rows in ([], [0], [2, 3], [1, 4], [0, 1, 2, 3, 4]):
        found = shards.read_rows(uri, np.array(rows, np.int32))
        assert found.to_pylist() == [image_table().to_pylist()[row] for row in rows]
    with pytest.raises(UserError, match=r"shard\.parquet: has 5 images, no image 5; import the data again"):
        shards.read_rows(uri, np.array([1, 5]))
    with pytest.raises(UserError, match="no such shard"):
        shards.read_rows(str(tmp_path / "none.parquet"), np.array([1]))


def test_only_row_groups_with_wanted_rows_are_read(tmp_path):
    where = tmp_path / "shard.parquet"
    shards.write_shard(str(where), image_table(), row_group_size=1, use_dictionary=False, write_statistics=False)
    data = bytearray(where.read_bytes())
    data[data.index(png(20)) + 20] ^= 1
    where.write_bytes(data)
    assert len(shards.read_rows(str(where), np.array([0, 1, 3, 4]))) == 4
    with pytest.raises(UserError, match=r"shard\.parquet: not a readable Parquet file .*run again"):
        shards.read_rows(str(where), np.array([2]))


def test_a_foreign_or_missing_shard_has_no_metadata(tmp_path):
    assert shards.shard_metadata(str(tmp_path / "none.parquet")) is None
    foreign = pa.table({"x": [1]})
    storage.write_bytes(str(tmp_path / "foreign.parquet"), shards.table_bytes(foreign))
    assert shards.shard_metadata(str(tmp_path / "foreign.parquet")) is None
    with pytest.raises(UserError, match="no such shard"):
        shards.read_shard(str(tmp_path / "none.parquet"))


@pytest.fixture
def dataset(tmp_path) -> shards.Dataset:
    uri = str(tmp_path / "data")
    for name in ("part-0.parquet", "part-1.parquet"):
        shards.write_shard(storage.join(uri, name), image_table())
    made = shards.Dataset(
        uri=uri,
        class_names=NAMES,
        channels=3,
        image_size=(4, 4),
        mean=[0.1, 0.2, 1 / 3],
        std=[0.5] * 3,
        shards=[("part-0.parquet", 5), ("part-1.parquet", 5)],
        class_counts=[4, 4, 2],
        fingerprint="f",
    )
    shards.save_dataset(made)
    return made


def test_dataset_round_trip(dataset):
    assert shards.load_dataset(dataset.uri) == dataset
    assert shards.load_dataset(dataset.uri).num_images == 10
    assert [labels.tolist() for labels in shards.labels_of(dataset)] == [[0, 1, 2, 0, 1]] * 2
    mixed = dataclasses.replace(dataset, image_size=None)
    shards.save_dataset(mixed)
    assert shards.load_dataset(dataset.uri).image_size is None


def test_dataset_that_cannot_be_opened_says_how_to_make_one(dataset, tmp_path):
    with pytest.raises(UserError, match=r"^data\.train: no imported dataset at .*`prism import SRC"):
        shards.load_dataset(str(tmp_path / "nothing"), "data.train")
    where = storage.join(dataset.uri, shards.DATASET_FILE)
    storage.write_bytes(where, b"{ half")
    with pytest.raises(UserError, match=r"^data: .*not valid JSON"):
        shards.load_dataset(dataset.uri)
    storage.write_json(where, {"class_names": NAMES})
    with pytest.raises(UserError, match=r"^data: .*does not describe a dataset"):
        shards.load_dataset(dataset.uri)


def test_fingerprint_depends_on_content_and_name_but_not_on_order():
    one, two = ("a", "1"), ("b", "2")
    assert shards.fingerprint([one, two]) == shards.fingerprint([two, one])
    assert len({shards.fingerprint(x) for x in ([one, two], [one], [("a", "2"), ("b", "1")])}) == 3
