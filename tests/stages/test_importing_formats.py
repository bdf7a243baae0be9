"""Every format of labelled images, as real files of that format."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import shards, storage
from cluster.errors import UserError
from cluster.runner import run_serial
from stages.images import to_pixels
from stages.importing import import_dataset
from stages.importing.unpickle import read_batch


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
    return import_dataset(str(src), str(dst), runner=run_serial, **options)


def rows_of(uri: Path | str) -> list[dict]:
    dataset = shards.load_dataset(str(uri))
    return [row for u in dataset.shard_uris() for row in shards.read_shard(u).to_pylist()]


def pixels_of(row: dict, channels: int = 3) -> np.ndarray:
    size = Image.open(io.BytesIO(row["image"]["bytes"])).size[0]
    return to_pixels(row["image"]["bytes"], size, channels)


# ImageFolder


def write_tree(root: Path, classes: dict[str, list[bytes]], suffix: str = ".png") -> None:
    for name, images in classes.items():
        (root / name).mkdir(parents=True)
        for index, data in enumerate(images):
            (root / name / f"{index:02d}{suffix}").write_bytes(data)


def test_tree_with_splits(tmp_path):
    images = random_images(9)
    src, dst = tmp_path / "src", tmp_path / "dst"
    jpegs = [encoded(p, "JPEG", quality=80) for p in images]
    write_tree(src / "train", {"b": jpegs[:3], "a": jpegs[3:5], "C": jpegs[5:6]}, ".JPG")
    write_tree(src / "test", {"a": jpegs[6:7], "b": jpegs[7:8], "C": jpegs[8:9]}, ".jpeg")
    (src / "README.md").write_text("about")
    report = do_import(src, dst, images_per_shard=4)

    # Sorted names, capitals first, as torchvision does.
    assert report.class_names == ["C", "a", "b"]
    assert (report.format, report.ignored, report.corrupt, report.already_done) == (
        "imagefolder",
        1,
        [],
        False,
    )
    assert [(s.name, s.images) for s in report.splits] == [("train", 6), ("val", 3)]
    rows = rows_of(dst / "train")
    assert [row["label"] for row in rows] == [0, 1, 1, 2, 2, 2]
    assert [row["image"]["path"] for row in rows][:2] == ["train/C/00.JPG", "train/a/00.JPG"]
    assert [row["image"]["bytes"] for row in rows] == [jpegs[i] for i in (5, 3, 4, 0, 1, 2)], "original bytes kept"
    dataset = shards.load_dataset(str(dst / "train"))
    assert dataset.shards == [("part-00000.parquet", 4), ("part-00001.parquet", 2)]
    assert dataset.class_counts == [1, 2, 3]
    assert (dataset.image_size, dataset.channels) == ((32, 32), 3)
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(j))) for j in jpegs[:6]]) / 255
    np.testing.assert_allclose(dataset.mean, decoded.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, decoded.std((0, 1, 2)), rtol=1e-9)
    assert shards.load_dataset(str(dst / "val")).class_names == ["C", "a", "b"]


def test_plain_tree_with_images_folders_and_links(tmp_path):
    images = [encoded(p) for p in random_images(4)]
    src = tmp_path / "src"
    write_tree(src, {"n01": images[:2], "n02/images": images[2:3]})
    (tmp_path / "elsewhere.png").write_bytes(images[3])
    (src / "n02" / "images" / "09.png").symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "link").symlink_to(src, target_is_directory=True)
    do_import(tmp_path / "link", tmp_path / "dst")
    rows = rows_of(tmp_path / "dst" / "train")
    assert [(r["label"], r["image"]["path"]) for r in rows] == [
        (0, "n01/00.png"), (0, "n01/01.png"), (1, "n02/images/00.png"), (1, "n02/images/09.png"),
    ]  # fmt: skip
    assert rows[3]["image"]["bytes"] == images[3]
    assert not (tmp_path / "dst" / "val").exists()


def test_a_class_called_train_is_a_class(tmp_path):
    images = [encoded(p) for p in random_images(3)]
    write_tree(tmp_path / "src", {"bus": images[:1], "car": images[1:2], "train": images[2:]})
    assert do_import(tmp_path / "src", tmp_path / "dst").class_names == ["bus", "car", "train"]


def test_split_folders_in_capitals_are_splits(tmp_path):
    images = [encoded(p) for p in random_images(4)]
    write_tree(tmp_path / "src" / "Train", {"a": images[:1], "b": images[1:2]})
    write_tree(tmp_path / "src" / "Test", {"a": images[2:3], "b": images[3:]})
    report = do_import(tmp_path / "src", tmp_path / "dst")
    assert (report.class_names, [s.name for s in report.splits]) == (["a", "b"], ["train", "val"])


def test_the_first_of_val_validation_test_counts(tmp_path):
    images = [encoded(p) for p in random_images(6)]
    for split, start in (("train", 0), ("test", 2), ("validation", 4)):
        write_tree(tmp_path / "src" / split, {"a": images[start : start + 1], "b": images[start + 1 : start + 2]})
    report = do_import(tmp_path / "src", tmp_path / "dst")
    assert [row["image"]["path"] for row in rows_of(tmp_path / "dst" / "val")] == [
        "validation/a/00.png", "validation/b/00.png",
    ]  # fmt: skip
    assert report.ignored == 2


def test_other_encodings_become_lossless_png(tmp_path):
    pixels = random_images(2)[:, :, :20]
    grey = pixels[..., 0]
    write_tree(tmp_path / "src" / "a", {".": [encoded(pixels[0], "BMP")]}, ".bmp")
    write_tree(tmp_path / "src" / "b", {".": [encoded(pixels[1], "WEBP", lossless=True)]}, ".webp")
    write_tree(tmp_path / "src" / "c", {".": [encoded(grey[0], "TIFF")]}, ".tif")
    do_import(tmp_path / "src", tmp_path / "dst")
    rows = rows_of(tmp_path / "dst" / "train")
    decoded = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
    assert [(image.format, image.mode) for image in decoded] == [("PNG", "RGB"), ("PNG", "RGB"), ("PNG", "L")]
    for image, expected in zip(decoded, [pixels[0], pixels[1], grey[0]], strict=True):
        np.testing.assert_array_equal(np.asarray(image), expected)
    dataset = shards.load_dataset(str(tmp_path / "dst" / "train"))
    assert (dataset.channels, dataset.image_size) == (3, (32, 20))
    # A grey image counts in all three channels, as it does once it is converted.
    reference = np.stack([pixels[0], pixels[1], np.repeat(grey[0][..., None], 3, 2)]) / 255
    np.testing.assert_allclose(dataset.mean, reference.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, reference.std((0, 1, 2)), rtol=1e-9)


def test_images_of_different_sizes(tmp_path):
    write_tree(tmp_path / "src", {"a": [encoded(random_images(1, 20)[0])], "b": [encoded(random_images(1, 30)[0])]})
    do_import(tmp_path / "src", tmp_path / "dst")
    assert shards.load_dataset(str(tmp_path / "dst" / "train")).image_size is None


def test_real_photographs(tmp_path, shared_data):
    import tarfile

    with tarfile.open(shared_data / "imagenette224" / "imagenette224_sub.tar") as tar:
        members = [m for m in tar.getmembers() if m.isfile()][::40]
        tar.extractall(tmp_path / "src", members, filter="data")
    report = do_import(tmp_path / "src" / "imagenette224_sub", tmp_path / "dst")
    assert report.corrupt == []
    assert sum(split.images for split in report.splits) == len(members)
    files = {p.read_bytes() for p in (tmp_path / "src").rglob("*.JPEG")}
    assert {row["image"]["bytes"] for s in ("train", "val") for row in rows_of(tmp_path / "dst" / s)} == files


@pytest.mark.parametrize(
    ("val", "words"),
    [
        ({"a": 1}, r"the val split of .* has no images of 1 of 2 classes \(b\)"),
        ({"a": 1, "b": 1, "z": 1}, r"holds the class folder 'z' .* which train/ has not"),
    ],
)
def test_splits_must_have_the_same_classes(tmp_path, val, words):
    image = encoded(random_images(1)[0])
    write_tree(tmp_path / "src" / "train", {"a": [image], "b": [image]})
    write_tree(tmp_path / "src" / "val", {name: [image] for name in val})
    with pytest.raises(UserError, match=words):
        do_import(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_an_image_outside_a_class_folder_is_refused(tmp_path):
    image = encoded(random_images(1)[0])
    write_tree(tmp_path / "src", {"a": [image], "b": [image]})
    (tmp_path / "src" / "stray.png").write_bytes(image)
    with pytest.raises(UserError, match=r"stray\.png lies in no class folder"):
        do_import(tmp_path / "src", tmp_path / "dst")
    # Beside the class folders of a split as well, which it does not turn into a class.
    write_tree(tmp_path / "split" / "train", {"a": [image], "b": [image]})
    (tmp_path / "split" / "train" / "overview.png").write_bytes(image)
    with pytest.raises(UserError, match=r"overview\.png lies in no class folder"):
        do_import(tmp_path / "split", tmp_path / "dst")


# CIFAR


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


# IDX


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


# Parquet


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
    assert [row["label"] for row in rows] == [0, 0, 0, 1, 1, 1]
    for row, index in zip(rows, [1, 3, 5, 0, 2, 4], strict=True):
        np.testing.assert_array_equal(pixels_of(row), pixels[index].transpose(2, 0, 1))
    assert [row["label"] for row in rows_of(tmp_path / "dst" / "val")] == [0, 1]


def test_own_shards_can_be_imported_again(tmp_path):
    write_tree(tmp_path / "src", {"b": [encoded(p) for p in random_images(3)], "a": [encoded(random_images(1)[0])]})
    do_import(tmp_path / "src", tmp_path / "once", images_per_shard=3)
    do_import(tmp_path / "once", tmp_path / "twice")
    once, twice = rows_of(tmp_path / "once" / "train"), rows_of(tmp_path / "twice" / "train")
    assert [(r["label"], r["image"]["bytes"]) for r in once] == [(r["label"], r["image"]["bytes"]) for r in twice]


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


def test_format_can_be_forced_and_unknown_ones_are_refused(tmp_path):
    write_tree(tmp_path / "src", {"a": [encoded(random_images(1)[0])], "b": [encoded(random_images(1)[0])]})
    with pytest.raises(UserError, match=r"--format: 'webdataset' is unknown; choose auto, imagefolder, cifar"):
        do_import(tmp_path / "src", tmp_path / "dst", format="webdataset")
    for format, words in [
        ("cifar", "no CIFAR python batches"),
        ("idx", "no IDX training"),
        ("parquet", "no training"),
    ]:
        with pytest.raises(UserError, match=words):
            do_import(tmp_path / "src", tmp_path / "dst", format=format)
    assert do_import(tmp_path / "src", tmp_path / "dst", format="imagefolder").format == "imagefolder"
    assert storage.exists(str(tmp_path / "dst" / "import.json"))
