"""CIFAR python batches as real files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from importing_files import do_import, pixels_of, rows_of
from PIL import Image

from cluster.errors import UserError
from stages.importing.unpickle import read_batch


def python2_batch(batch: dict) -> bytes:
    """A protocol 2 pickle as CIFAR's: byte strings as keys, numpy under its old module names."""
    return pickle.dumps(batch, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_images(shared_data: Path, count: int) -> tuple[np.ndarray, list[int]]:
    """Lossless CIFAR-10 training images uint8 [count, 32, 32, 3], and their labels."""
    with Image.open(shared_data / "cifar10" / "cifar10_batch_0.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(1000, 32, 32, 3)[:count]
    return pixels, json.loads((shared_data / "cifar10" / "train_labels.json").read_text())[:count]


CIFAR_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_cifar10_batches(tmp_path, shared_data):
    pixels, labels = cifar_images(shared_data, 90)
    flat = pixels.transpose(0, 3, 1, 2).reshape(90, -1)
    src = tmp_path / "src" / "cifar-10-batches-py"
    src.mkdir(parents=True)
    meta = {b"label_names": [n.encode() for n in CIFAR_NAMES], b"num_vis": 3072}
    (src / "batches.meta").write_bytes(python2_batch(meta))
    for name, part in [
        ("data_batch_1", slice(0, 30)),
        ("data_batch_2", slice(30, 60)),
        ("test_batch", slice(60, 90)),
    ]:
        batch = {
            b"batch_label": b"x",
            b"labels": labels[part],
            b"data": flat[part],
            b"filenames": [b"f.png"] * 30,
        }
        (src / name).write_bytes(python2_batch(batch))
    (src / "readme.html").write_text("x")
    report = do_import(tmp_path / "src", tmp_path / "dst", images_per_shard=25)
    assert (report.format, report.class_names, report.ignored) == ("cifar", CIFAR_NAMES, 1)

    rows = rows_of(tmp_path / "dst" / "train")
    order = np.argsort(labels[:60], kind="stable")
    assert [row["label"] for row in rows] == [labels[i] for i in order]
    assert rows[0]["image"]["path"] == f"cifar-10-batches-py/data_batch_{order[0] // 30 + 1}/{order[0] % 30:05d}"
    for row, index in zip(rows, order, strict=True):
        np.testing.assert_array_equal(pixels_of(row), pixels[index].transpose(2, 0, 1))
    val = rows_of(tmp_path / "dst" / "val")
    np.testing.assert_array_equal(pixels_of(val[0]).reshape(-1), flat[60 + np.argsort(labels[60:], kind="stable")[0]])


def test_cifar100_batches(tmp_path):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (6, 3072)).astype(np.uint8)
    names = [b"apple", b"zebra", b"bee"]  # The file's order, which is not the alphabet's.
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "meta").write_bytes(python2_batch({b"fine_label_names": names, b"coarse_label_names": [b"q"]}))
    for name, part in [("train", slice(0, 3)), ("test", slice(3, 6))]:
        batch = {b"fine_labels": [2, 0, 1], b"coarse_labels": [0, 0, 0], b"data": data[part]}
        (tmp_path / "src" / name).write_bytes(python2_batch(batch))
    report = do_import(tmp_path / "src", tmp_path / "dst")
    assert report.class_names == ["apple", "zebra", "bee"]
    rows = rows_of(tmp_path / "dst" / "train")
    np.testing.assert_array_equal(pixels_of(rows[2]).reshape(-1), data[0])


def test_python2_strings_and_fortran_order_are_read():
    # Python 2 wrote str as SHORT_BINSTRING, which has no encoding; protocol 2 by hand:
    # {'labels': [1], 'name': 'ab'}
    text = b"\x80\x02}(U\x06labels]K\x01aU\x04nameU\x02abu."
    assert read_batch(text, "x") == {"labels": [1], "name": "ab"}
    array = np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    np.testing.assert_array_equal(read_batch(pickle.dumps({b"data": array}, protocol=2), "x")["data"], array)


class Malicious:
    """Pickles to a call of ``os.system``."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_malicious_pickle_is_refused_and_runs_nothing(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    (src / "batches.meta").write_bytes(python2_batch({b"label_names": [b"a", b"b"]}))
    (src / "data_batch_1").write_bytes(pickle.dumps({b"data": Malicious(tmp_path / "ran")}, protocol=2))
    with pytest.raises(UserError, match=r"data_batch_1 is refused.*(posix|nt)\.system"):
        do_import(src, tmp_path / "dst")
    assert not (tmp_path / "ran").exists()
    pickle.loads((src / "data_batch_1").read_bytes())
    assert (tmp_path / "ran").exists(), "the file would have run, had it been unpickled"


@pytest.mark.parametrize(
    "payload",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'zlib'\ntR.",
        b"cnumpy\nloadtxt\n.",
        b"cnumpy.core.multiarray\nscalar\n.",
        pickle.dumps({b"data": np.array([{}], dtype=object)}, protocol=2),
        pickle.dumps({b"data": np.zeros(3)}, protocol=2),
        pickle.dumps([1, 2], protocol=2),
        b"",
        b"not a pickle",
        pickle.dumps({b"labels": [1, 2, 3]}, protocol=2)[:-6],
    ],
)
def test_anything_but_a_plain_batch_is_refused(payload):
    with pytest.raises(UserError, match=r"^SRC: some_batch is refused"):
        read_batch(payload, "some_batch")


def test_cifar_batch_without_its_parts_is_refused(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    data = np.zeros((2, 3072), np.uint8)
    (src / "batches.meta").write_bytes(python2_batch({b"label_names": [b"a", b"b"]}))
    for batch, words in [
        ({b"labels": [0, 1]}, "holds no images of 3×32×32"),
        ({b"labels": [0], b"data": data}, "no labels for each image"),
        ({b"labels": [0, 2], b"data": data}, "labels outside the 2 classes"),
    ]:
        (src / "data_batch_1").write_bytes(python2_batch(batch))
        with pytest.raises(UserError, match=f"data_batch_1.*{words}"):
            do_import(src, tmp_path / "dst")
