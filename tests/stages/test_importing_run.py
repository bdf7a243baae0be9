"""The import as a whole: corrupt images, resuming, refusing, S3, and Ray against the serial runner."""

from __future__ import annotations

import io
import json
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import shards, storage
from cluster.errors import RunError, UserError
from cluster.runner import run_ray, run_serial
from stages.importing import import_dataset, stage
from stages.importing.detect import open_source
from stages.importing.stage import content_sha256


def encoded(value: int, form: str = "PNG", size: int = 16) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (size, size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two splits, three classes, 5 and 2 images each."""
    for split, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(["ant", "bee", "cow"]):
            folder = tmp_path / "src" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index}.png").write_bytes(encoded(10 * label + index))
    return tmp_path / "src"


@pytest.fixture
def damaged(tree) -> Path:
    """The tree with four bad files among its 21."""
    good = encoded(99, "JPEG")
    (tree / "train" / "bee" / "1.png").write_bytes(b"")
    (tree / "train" / "bee" / "3.png").write_bytes(good[: len(good) // 2])
    (tree / "train" / "cow" / "4.png").write_text("no image at all")
    (tree / "val" / "ant" / "0.png").unlink()
    (tree / "val" / "ant" / "0.png").symlink_to("nowhere.png")
    return tree


def serial(src: Path | str, dst: Path | str, **options):
    return import_dataset(open_source(str(src)), str(dst), runner=run_serial, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


BAD = ["train/bee/1.png", "train/bee/3.png", "train/cow/4.png", "val/ant/0.png"]


def test_corrupt_images_are_reported_by_name_and_left_out(damaged, tmp_path):
    report = serial(damaged, tmp_path / "dst", images_per_shard=4)
    assert [name for name, _ in report.corrupt] == BAD
    reasons = dict(report.corrupt)
    assert reasons["train/bee/1.png"] == "the file is empty"
    assert "truncated" in reasons["train/bee/3.png"].lower()
    assert "not an image" in reasons["train/cow/4.png"]
    assert "No such file" in reasons["val/ant/0.png"]
    assert not any("0x" in reason for reason in reasons.values()), "addresses differ from run to run"
    assert [(s.name, s.images, len(s.corrupt)) for s in report.splits] == [("train", 12, 3), ("val", 5, 1)]

    train = shards.load_dataset(str(tmp_path / "dst" / "train"))
    assert (train.num_images, train.class_counts) == (12, [5, 3, 4])
    names = [
        row["image"]["path"] for uri in train.shard_uris() for row in shards.read_shard(uri, ["image"]).to_pylist()
    ]
    assert len(names) == 12
    assert not set(names) & set(BAD)
    listed = json.loads((tmp_path / "dst" / "train" / "corrupt.json").read_text())
    assert listed == [{"name": name, "reason": reasons[name]} for name in BAD[:3]]
    assert [r["name"] for r in json.loads((tmp_path / "dst" / "val" / "corrupt.json").read_text())] == BAD[3:]


def test_strict_stops_and_leaves_nothing(damaged, tmp_path):
    words = r"4 of 21 images of .* are corrupt, the first is train/bee/1\.png \(the file is empty\)"
    with pytest.raises(UserError, match=words) as caught:
        serial(damaged, tmp_path / "dst", strict=True)
    assert caught.value.exit_code == 2
    assert files(tmp_path / "dst") == {}
    # An import that was accepted before is refused, but not destroyed.
    serial(damaged, tmp_path / "dst")
    before = files(tmp_path / "dst")
    with pytest.raises(UserError, match=words):
        serial(damaged, tmp_path / "dst", strict=True)
    assert files(tmp_path / "dst") == before


def test_strict_accepts_sound_data(tree, tmp_path):
    assert serial(tree, tmp_path / "dst", strict=True).corrupt == []
    assert not (tmp_path / "dst" / "train" / "corrupt.json").exists()


def test_a_shard_without_any_readable_image_is_left_out(tree, tmp_path):
    for path in (tree / "train" / "ant").iterdir():
        path.write_bytes(b"x")
    serial(tree, tmp_path / "dst", images_per_shard=5)
    train = shards.load_dataset(str(tmp_path / "dst" / "train"))
    assert train.shards == [("part-00001.parquet", 5), ("part-00002.parquet", 5)]
    assert train.class_counts == [0, 5, 5]


def test_nothing_readable_at_all_is_refused(tree, tmp_path):
    for path in tree.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="21 of 21 images"):
        serial(tree, tmp_path / "dst")
    assert files(tmp_path / "dst") == {}


def test_large_images_are_written_in_small_row_groups(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 4_000)
    serial(tree, tmp_path / "dst")
    metadata = pq.read_metadata(tmp_path / "dst" / "train" / "part-00000.parquet")
    assert metadata.num_rows == 15
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert max(groups) * 850 < 4_000, "a PNG of noise, 16 px, has at least 850 bytes"
    monkeypatch.undo()
    serial(tree, tmp_path / "one")
    assert pq.read_metadata(tmp_path / "one" / "train" / "part-00000.parquet").num_row_groups == 1


def test_progress_counts_images(tree, tmp_path):
    seen = []
    serial(tree, tmp_path / "dst", images_per_shard=6, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(6, 21), (12, 21), (15, 21), (21, 21)]


def test_finished_import_is_left_alone(tree, tmp_path):
    first = serial(tree, tmp_path / "dst")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "dst").rglob("*")}
    second = serial(tree, tmp_path / "dst")
    assert (first.already_done, second.already_done) == (False, True)
    assert second.splits == first.splits
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "dst").rglob("*")} == stamps


def test_interrupted_import_goes_on(tree, tmp_path, monkeypatch):
    serial(tree, tmp_path / "whole", images_per_shard=4)
    real, built = stage.build_shard, []

    def third_fails(*args):
        built.append(args)
        if len(built) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(stage, "build_shard", third_fails)
    with pytest.raises(KeyboardInterrupt):
        serial(tree, tmp_path / "dst", images_per_shard=4)
    with pytest.raises(UserError, match="no imported dataset"):
        shards.load_dataset(str(tmp_path / "dst" / "train"))
    # One of the two finished shards is cut short behind its back.
    part = tmp_path / "dst" / "train" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    serial(tree, tmp_path / "dst", images_per_shard=4)
    assert len(built) == 3 + 6 - 1, "of six shards, only one was sound"
    for split in ("train", "val"):
        assert files(tmp_path / "dst" / split) == files(tmp_path / "whole" / split)


def test_failed_shard_ends_with_how_to_resume(tree, tmp_path, monkeypatch):
    real = stage.build_shard

    def fails(keys, *args):
        if keys[0].startswith("val"):
            raise MemoryError("too big")
        return real(keys, *args)

    monkeypatch.setattr(stage, "build_shard", fails)
    with pytest.raises(RunError, match=r"1 shards failed \(import: MemoryError: too big\); run it again to resume"):
        serial(tree, tmp_path / "dst")
    monkeypatch.undo()
    assert serial(tree, tmp_path / "dst").already_done is False


def test_other_data_at_the_destination_are_not_touched(tree, tmp_path):
    dst = tmp_path / "dst"
    serial(tree, dst)
    before = files(dst)
    (tree / "train" / "ant" / "new.png").write_bytes(encoded(5))
    with pytest.raises(UserError, match=r"^DST: .*already holds another import \(from .*src"):
        serial(tree, dst)
    with pytest.raises(UserError, match="already holds another import"):
        serial(tree, dst, images_per_shard=7)
    assert files(dst) == before

    (tmp_path / "foreign" / "train").mkdir(parents=True)
    (tmp_path / "foreign" / "train" / "thesis.doc").write_text("precious")
    with pytest.raises(UserError, match=r"^DST: .*already holds files of something else"):
        serial(tree, tmp_path / "foreign", strict=True)
    assert (tmp_path / "foreign" / "train" / "thesis.doc").read_text() == "precious"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, r"^SRC: .* does not exist"),
        (lambda p: p.write_text("x"), r"^SRC: .* is a file; unpack it"),
        (lambda p: p.mkdir(), r"^SRC: .* is empty"),
        (
            lambda p: [p.mkdir(), (p / "notes.txt").write_text("x")],
            r"^SRC: no labelled images .*CLASS/\*\.jpg.*batches\.meta.*train-images-idx3-ubyte.*\*\.parquet",
        ),
        (
            lambda p: [(p / "all").mkdir(parents=True), (p / "all" / "1.png").write_bytes(encoded(1))],
            r"^SRC: .* holds a single class \(all\)",
        ),
    ],
)
def test_unusable_source(tmp_path, make, words):
    make(tmp_path / "src")
    with pytest.raises(UserError, match=words):
        serial(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_unusable_destination(tree, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^DST: .*file is not writable"):
        serial(tree, tmp_path / "file")
    for inside in (tree, tree / "out"):
        with pytest.raises(UserError, match=r"^DST: .*lies within SRC"):
            serial(tree, inside)


def test_a_fingerprint_is_of_the_images_not_of_how_the_file_was_written(tree, tmp_path):
    serial(tree, tmp_path / "dst")
    dataset = shards.load_dataset(str(tmp_path / "dst" / "train"))
    table, names = shards.read_shard(dataset.shard_uri(0)), dataset.class_names
    digest = content_sha256(table, names)
    assert dataset.fingerprint == shards.fingerprint([(dataset.shards[0][0], digest)])
    pq.write_table(table, tmp_path / "other.parquet", compression="gzip", row_group_size=1)
    assert (tmp_path / "other.parquet").read_bytes() != storage.read_bytes(dataset.shard_uri(0))
    assert content_sha256(pq.read_table(tmp_path / "other.parquet"), names) == digest
    labels = pa.array([(label + 1) % 3 for label in table["label"].to_pylist()])
    others = [table.set_column(1, table.schema.field("label"), labels), table.slice(1), table.take([1, 0])]
    digests = {content_sha256(other, names) for other in others}
    assert len(digests | {digest, content_sha256(table, names[::-1])}) == 5


@pytest.mark.s3
def test_from_and_to_s3_gives_the_same_bytes(damaged, tmp_path, s3_server):
    (damaged / "val" / "ant" / "0.png").unlink()  # A link without target cannot be uploaded.
    (damaged / "val" / "ant" / "0.png").write_bytes(b"x")
    bucket = f"{s3_server}/{uuid.uuid4().hex}"
    for name, data in files(damaged).items():
        storage.write_bytes(f"{bucket}/src/{name}", data)
    local = serial(damaged, tmp_path / "dst", images_per_shard=4)
    remote = serial(f"{bucket}/src", f"{bucket}/dst", images_per_shard=4)
    assert remote.corrupt == local.corrupt
    for split in ("train", "val"):
        ours = shards.load_dataset(f"{bucket}/dst/{split}")
        assert ours.fingerprint == shards.load_dataset(str(tmp_path / "dst" / split)).fingerprint
        for name, data in files(tmp_path / "dst" / split).items():
            assert storage.read_bytes(f"{bucket}/dst/{split}/{name}") == data
    assert serial(f"{bucket}/src", f"{bucket}/dst", images_per_shard=4).already_done
    with pytest.raises(UserError, match="there are no files below"):
        serial(f"{bucket}/typo", f"{bucket}/other")
    with pytest.raises(UserError, match=r"^SRC: s3://no-such-bucket-anywhere"):
        serial("s3://no-such-bucket-anywhere/x", f"{bucket}/other")


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_bytes_of_the_serial_runner(damaged, tmp_path, ray_local):
    one = serial(damaged, tmp_path / "one", images_per_shard=4)
    two = import_dataset(open_source(str(damaged)), str(tmp_path / "two"), images_per_shard=4, runner=run_ray)
    assert two.corrupt == one.corrupt
    for split in ("train", "val"):
        assert files(tmp_path / "one" / split) == files(tmp_path / "two" / split)


@pytest.mark.ray
@pytest.mark.s3
def test_ray_workers_reach_s3(tree, tmp_path, s3_server, ray_local):
    bucket = f"{s3_server}/{uuid.uuid4().hex}"
    import_dataset(open_source(str(tree)), f"{bucket}/dst", runner=run_ray)
    serial(tree, tmp_path / "dst")
    ours = shards.load_dataset(f"{bucket}/dst/train").fingerprint
    assert ours == shards.load_dataset(str(tmp_path / "dst" / "train")).fingerprint
