"""ImageFolder trees as real files; the choice of the format."""

from __future__ import annotations

import io

import numpy as np
import pytest
from importing_files import do_import, encoded, random_images, rows_of, write_tree
from PIL import Image

from cluster import shards, storage
from cluster.errors import UserError


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
