"""IDX files, the MNIST family."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from importing_files import do_import, pixels_of, rows_of

from cluster import shards
from cluster.errors import UserError


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def mnist_part(shared_data: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    images = gzip.decompress((shared_data / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((shared_data / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return pixels[:count], np.frombuffer(labels, np.uint8, offset=8)[:count]


@pytest.mark.parametrize("packed", [True, False])
def test_mnist(tmp_path, shared_data, packed):
    pixels, labels = mnist_part(shared_data, 300)
    src = tmp_path / "src"
    src.mkdir()
    for prefix, part in [("train", slice(0, 200)), ("t10k", slice(200, 300))]:
        for kind, array in [("images-idx3", pixels[part]), ("labels-idx1", labels[part])]:
            data = idx_bytes(array)
            name = f"{prefix}-{kind}-ubyte"
            (src / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    report = do_import(src, tmp_path / "dst", images_per_shard=64)
    assert report.class_names == list("0123456789")
    dataset = shards.load_dataset(str(tmp_path / "dst" / "train"))
    assert (dataset.channels, dataset.image_size, len(dataset.shards)) == (1, (28, 28), 4)
    np.testing.assert_allclose(dataset.mean, [(pixels[:200] / 255).mean()], rtol=1e-12)
    np.testing.assert_allclose(dataset.std, [(pixels[:200] / 255).std()], rtol=1e-9)
    rows = rows_of(tmp_path / "dst" / "train")
    order = np.argsort(labels[:200], kind="stable")
    for row, index in zip(rows, order, strict=True):
        assert row["label"] == labels[index]
        np.testing.assert_array_equal(pixels_of(row, 1)[0], pixels[index])


def test_idx_labels_that_start_at_one(tmp_path):
    (tmp_path / "src").mkdir()
    images, labels = np.zeros((4, 5, 5)), np.array([1, 2, 2, 26])
    (tmp_path / "src" / "emnist-letters-train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (tmp_path / "src" / "emnist-letters-train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    report = do_import(tmp_path / "src", tmp_path / "dst")
    assert report.class_names == ["1", "2", "26"]
    assert [row["label"] for row in rows_of(tmp_path / "dst" / "train")] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("train-images-idx3-ubyte.gz", lambda d: d[:-20], "is damaged"),
        (
            "train-images-idx3-ubyte.gz",
            lambda d: gzip.compress(gzip.decompress(d)[:-7]),
            "bytes where its head says",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            lambda d: gzip.compress(b"\0\0\x0b\x01" + bytes(8)),
            "is no IDX file of 1-dim",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            lambda d: gzip.compress(idx_bytes(np.zeros(9))),
            "10 images but .* 9 labels",
        ),
        ("train-labels-idx1-ubyte.gz", None, "lacks the labels of train-images"),
        ("train-images-idx3-ubyte.gz", None, "no labelled images found"),
    ],
)
def test_damaged_idx_names_the_file(tmp_path, file, change, words):
    src = tmp_path / "src"
    src.mkdir()
    labels = np.arange(10) % 2
    (src / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros((10, 8, 8)))))
    (src / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    if change:
        (src / file).write_bytes(change((src / file).read_bytes()))
    else:
        (src / file).unlink()
    with pytest.raises(UserError, match=words):
        do_import(src, tmp_path / "dst")
