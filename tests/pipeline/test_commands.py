"""Commands beside the run itself: what they print and where they end."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_tree import write_tree

from pipeline.loading import load_config

ROOT = Path(__file__).resolve().parents[2]


def test_plan_of_the_published_setting(prism, monkeypatch):
    """IPC 10 of ImageNet-1K, without its images: 4000 … 500 steps, 25,500 a chunk of classes."""
    monkeypatch.chdir(ROOT)
    code, text, err = prism("plan", "examples/imagenet1k.yaml")
    assert code == 0, err
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in text.splitlines() if "resnet18 │" in line]
    steps = ["4,000", "3,500", "3,000", "2,500", "2,000", "1,500", "1,000", "500", "4,000", "3,500"]
    assert rows == [[str(index), "10", count] for index, count in enumerate(steps)]
    assert "100 units of 100 images; 255,000 steps in all, 25,500 a chunk" in text
    for words in ("10,000 images of 224 px, about 1.35 GB", "300 epochs", "about 12.4 GB", "4.52 GPU-hours"):
        assert words in text


@pytest.mark.ray
def test_import_names_corrupt_images_and_goes_on(prism, tmp_path, ray_local):
    tree = write_tree(tmp_path / "tree", ["ant", "bee"], {"train": 3, "val": 2})
    (tree / "train" / "bee" / "001.png").write_bytes(b"no image")
    code, text, err = prism("import", tree, tmp_path / "strict", "--strict")
    assert code == 2
    assert "train/bee/001.png" in err
    assert not list((tmp_path / "strict").rglob("*.parquet"))
    code, text, err = prism("import", tree, tmp_path / "data")
    assert code == 0, err
    assert "imagefolder, 2 classes, train 6, val 4 images" in text
    assert "data/train: 5 images, 1 corrupt left out" in text
    assert "corrupt: train/bee/001.png" in text


def test_dry_runs_write_nothing(prism, tmp_path):
    tree = write_tree(tmp_path / "tree", ["ant", "bee"], {"train": 1, "val": 1})
    before = sorted(tmp_path.rglob("*"))
    for words in (["init", tmp_path / "mine"], ["import", tree, tmp_path / "data"]):
        code, text, err = prism(*words, "--dry-run")
        assert code == 0, err
        assert sorted(tmp_path.rglob("*")) == before
    assert "train 2, val 2 images" in text


def test_the_demo_is_an_example_too(monkeypatch):
    monkeypatch.chdir(ROOT)
    named, default = load_config("examples/demo.yaml"), load_config(None)
    assert Path(named.data.train or "").resolve() == Path(default.data.train or "").resolve()
    assert named.model_copy(update={"data": default.data}) == default
