"""Parquet in the Hugging Face layout, in and out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from importing_files import do_import, encoded, pixels_of, random_images, rows_of, write_tree

from cluster import shards
from cluster.errors import UserError


def hf_files(folder: Path, column: str, label: str, names: list[str] | None) -> np.ndarray:
    """Two train files and one test file as ``datasets`` writes them; returns the pixels [8, 32, 32, 3]."""
    datasets = pytest.importorskip("datasets")
    pixels = random_images(8)
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({column: datasets.Image(), label: kind, "extra": datasets.Value("string")})
    folder.mkdir(parents=True)
    for name, ids in [
        ("train-00000-of-00002", [0, 1, 2]),
        ("train-00001-of-00002", [3, 4, 5]),
        ("test-0", [6, 7]),
    ]:
        rows = {
            column: [{"bytes": encoded(pixels[i]), "path": None} for i in ids],
            label: [(i + 1) % 2 for i in ids],
            "extra": ["x"] * len(ids),
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{name}.parquet"), batch_size=2)
    return pixels


@pytest.mark.parametrize(
    ("column", "label", "names"),
    [("image", "label", ["zebra", "ant"]), ("img", "fine_label", ["b", "a"]), ("image", "labels", None)],
)
def test_huggingface_parquet(tmp_path, column, label, names):
    pixels = hf_files(tmp_path / "src" / "data", column, label, names)
    report = do_import(tmp_path / "src", tmp_path / "dst", images_per_shard=4)
    assert (report.format, report.class_names) == ("parquet", names or ["0", "1"])
    rows = rows_of(tmp_path / "dst" / "train")
    # In source order, so that a shard reads neighbouring rows.
    assert [row["label"] for row in rows] == [1, 0, 1, 0, 1, 0]
    for row, source in zip(rows, pixels[:6], strict=True):
        np.testing.assert_array_equal(pixels_of(row), source.transpose(2, 0, 1))
    assert [row["label"] for row in rows_of(tmp_path / "dst" / "val")] == [1, 0]


def test_own_shards_can_be_imported_again(tmp_path):
    write_tree(tmp_path / "src", {"b": [encoded(p) for p in random_images(3)], "a": [encoded(random_images(1)[0])]})
    do_import(tmp_path / "src", tmp_path / "once", images_per_shard=3)
    do_import(tmp_path / "once", tmp_path / "twice")
    once, twice = rows_of(tmp_path / "once" / "train"), rows_of(tmp_path / "twice" / "train")
    assert [(r["label"], r["image"]["bytes"]) for r in once] == [(r["label"], r["image"]["bytes"]) for r in twice]


def test_split_folders_in_capitals_are_splits(tmp_path):
    write_tree(tmp_path / "src", {"a": [encoded(random_images(1)[0])], "b": [encoded(random_images(1)[0])]})
    do_import(tmp_path / "src", tmp_path / "once")
    content = (tmp_path / "once" / "train" / "part-00000.parquet").read_bytes()
    for name in ("Train", "TEST"):
        (tmp_path / "again" / name).mkdir(parents=True)
        (tmp_path / "again" / name / "0.parquet").write_bytes(content)
    report = do_import(tmp_path / "again", tmp_path / "dst")
    assert [(split.name, split.images) for split in report.splits] == [("train", 2), ("val", 2)]


def test_huggingface_reads_what_was_imported(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    pixels = random_images(4)
    write_tree(tmp_path / "src", {"x": [encoded(p) for p in pixels[:2]], "y": [encoded(p) for p in pixels[2:]]})
    do_import(tmp_path / "src", tmp_path / "dst", images_per_shard=3)
    loaded = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "dst/train/*.parquet"),
        cache_dir=str(tmp_path / "hf"),
        split="train",
    )
    assert loaded.features["label"].names == ["x", "y"]
    assert [row["label"] for row in loaded] == [0, 0, 1, 1]
    np.testing.assert_array_equal(np.asarray(loaded[3]["image"]), pixels[3])


def test_parquet_of_another_layout_is_refused(tmp_path):
    (tmp_path / "src").mkdir()
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "src" / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet .* has the columns text, label; needed are one of image"):
        do_import(tmp_path / "src", tmp_path / "dst")
    (tmp_path / "src" / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"x\.parquet .* is no readable Parquet file"):
        do_import(tmp_path / "src", tmp_path / "dst")


def test_parquet_labels_outside_the_names_are_refused(tmp_path):
    (tmp_path / "src").mkdir()
    table = pa.table(
        {
            "image": pa.array([{"bytes": b"x", "path": ""}], shards.IMAGE_TYPE),
            "label": pa.array([-1], pa.int64()),
        },
        schema=shards.image_schema(["a", "b"]),
    )
    pq.write_table(table, tmp_path / "src" / "train-0.parquet")
    with pytest.raises(UserError, match="labels outside its 2 class names"):
        do_import(tmp_path / "src", tmp_path / "dst")
