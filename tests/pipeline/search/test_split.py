"""The search split: what goes where, whatever happens on the way there."""

from __future__ import annotations

import dataclasses
import io
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster import shards, storage
from cluster.errors import RunError, UserError
from cluster.resources import ActorResources
from cluster.runner import run_ray, run_serial
from pipeline.search import split
from pipeline.search.split import plan_split, split_dataset
from stages.data import DataSpec
from stages.importing import import_dataset, select
from stages.importing.detect import open_source
from stages.squeeze.data import RealImages

NAMES = ["ant", "bee", "cow"]
RESOURCES = ActorResources()


def image_bytes(index: int, size: int = 300) -> bytes:
    """No image, but nobody looks at it."""
    return np.random.default_rng(index).bytes(size + index)


def write_data(uri: str, labels: list[int], rows: list[int]) -> shards.Dataset:
    """A dataset of images with these labels, cut into shards of these rows."""
    made, start = [], 0
    for index, count in enumerate(rows):
        records = [
            {"image": {"bytes": image_bytes(k), "path": f"{k}.png"}, "label": labels[k]}
            for k in range(start, start + count)
        ]
        table = pa.Table.from_pylist(records, schema=shards.image_schema(NAMES, metadata={"import": f"{index}"}))
        name = f"part-{index:05d}.parquet"
        shards.write_shard(storage.join(uri, name), table, row_group_size=3)
        made.append((name, count))
        start += count
    assert start == len(labels)
    counts = [labels.count(label) for label in range(len(NAMES))]
    fingerprint = shards.fingerprint([("all", str([labels, rows]))])
    dataset = shards.Dataset(uri, NAMES, 3, None, [0.1, 0.2, 0.3], [0.3] * 3, made, counts, fingerprint)
    shards.save_dataset(dataset)
    return dataset


LABELS = [0, 1, 2, 2, 1, 0, 0, 0, 1, 2, 2, 2, 1, 1, 0, 2, 0, 1, 2, 0]


@pytest.fixture
def train(tmp_path) -> shards.Dataset:
    """20 images in 5 shards, of which one has a single row."""
    return write_data(str(tmp_path / "data"), LABELS, [6, 1, 5, 4, 4])


def cut(train: shards.Dataset, out: Path | str, per_class: int = 2, seed: int = 0, runner=run_serial, **options):
    uris = split_dataset(train, str(out), per_class, seed, runner, RESOURCES, **options)
    return tuple(shards.load_dataset(uri) for uri in uris)


def images(dataset: shards.Dataset) -> list[tuple[str, bytes, int]]:
    """(path, bytes, label) of every image, in order, read as any reader does."""
    tables = [shards.read_shard(uri) for uri in dataset.shard_uris()]
    assert [len(table) for table in tables] == [rows for _, rows in dataset.shards]
    return [(r["image"]["path"], r["image"]["bytes"], r["label"]) for table in tables for r in table.to_pylist()]


def files(folder: Path | str) -> dict[str, bytes]:
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def data_files(out: Path | str) -> dict[str, bytes]:
    """Without what is recorded of the way there."""
    return {name: data for name, data in files(out).items() if name.split("/")[0] in ("train", "val")}


def check(train: shards.Dataset, made: tuple[shards.Dataset, ...], per_class: int) -> None:
    """Both parts together are the training images, each once, in their order; every class has its share."""
    rest, val = (images(part) for part in made)
    source = images(train)
    assert [image for image in source if image in rest] == rest
    assert [image for image in source if image in val] == val
    assert sorted(rest + val) == sorted(source)
    counts = Counter(label for _, _, label in val)
    assert counts == dict.fromkeys(range(len(NAMES)), per_class)
    assert made[1].class_counts == [per_class] * len(NAMES)
    assert made[0].class_counts == [n - per_class for n in train.class_counts]
    for part in made:
        assert (part.class_names, part.channels, part.mean, part.std, part.image_size) == (
            train.class_names, train.channels, train.mean, train.std, train.image_size,
        )  # fmt: skip
    assert len({part.fingerprint for part in (*made, train)}) == 3


class Counting:
    """The serial runner, which may stop and may go backwards; knows what it was asked for."""

    def __init__(self, stop: int | None = None, backwards: bool = False):
        self.stop, self.backwards, self.asked = stop, backwards, []

    def __call__(self, rows, stages) -> Iterator:
        self.asked = [row["id"] for row in rows]
        for index, row in enumerate(run_serial(rows[::-1] if self.backwards else rows, stages)):
            yield row
            if index + 1 == self.stop:
                raise KeyboardInterrupt


def test_every_image_is_in_one_of_the_two(train, tmp_path):
    made = cut(train, tmp_path / "out")
    check(train, made, 2)
    # As large as the data's largest, in few files.
    assert made[1].shards == [("part-00000.parquet", 6)]
    assert [name for name, _ in made[0].shards] == [name for name, rows in train.shards if name in dict(made[0].shards)]
    for part in made:
        schema = shards.read_shard(part.shard_uri(0)).schema
        assert schema.equals(shards.read_shard(train.shard_uri(0)).schema)
        assert shards.shard_metadata(part.shard_uri(0))["class_names"] == NAMES


def test_a_shard_that_is_all_in_the_split_is_left_out(tmp_path):
    train = write_data(str(tmp_path / "data"), [0, 1, 2, 0, 1, 2], [3, 1, 2])
    # The second shard is one image, and another seed takes the other one of its class.
    pairs = [cut(train, tmp_path / f"{seed}", 1, seed) for seed in range(8)]
    for pair in pairs:
        check(train, pair, 1)
    assert {"part-00001.parquet" in dict(rest.shards) for rest, _ in pairs} == {True, False}


def test_seed_and_size_and_data_decide(train, tmp_path):
    made = [cut(train, tmp_path / f"{seed}-{size}", size, seed) for seed, size in [(0, 2), (1, 2), (0, 3)]]
    other = dataclasses.replace(train, fingerprint="another")
    made.append(cut(other, tmp_path / "other"))
    assert len({tuple(images(val)) for _, val in made[:3]}) == 3
    assert len({part.fingerprint for pair in made for part in pair}) == 8
    again = cut(train, tmp_path / "again")
    assert [part.fingerprint for part in again] == [part.fingerprint for part in made[0]]


def test_order_of_work_makes_no_difference(train, tmp_path):
    cut(train, tmp_path / "one")
    cut(train, tmp_path / "two", runner=Counting(backwards=True))
    assert data_files(tmp_path / "one") == data_files(tmp_path / "two")


def test_a_finished_split_is_left_alone(train, tmp_path, monkeypatch):
    made = cut(train, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    real, listed = storage.list_entries, []
    monkeypatch.setattr(storage, "list_entries", lambda uri, *a: listed.append(uri) or real(uri, *a))
    monkeypatch.setattr(split, "plan_split", None)
    runner = Counting()
    assert cut(train, tmp_path / "out", runner=runner) == made
    assert runner.asked == []
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    # One of the shards and one of their records, for each of the two.
    assert sorted(listed) == sorted(str(tmp_path / "out" / x) for x in ("train", "val", "records/train", "records/val"))


def test_a_killed_split_goes_on(train, tmp_path):
    cut(train, tmp_path / "whole")
    units = len([name for name in data_files(tmp_path / "whole") if name.endswith(".parquet")])
    for stop in range(1, units + 1):
        out = tmp_path / f"{stop}"
        with pytest.raises(KeyboardInterrupt):
            cut(train, out, runner=Counting(stop))
        for part in ("train", "val"):
            with pytest.raises(UserError, match="no imported dataset"):
                shards.load_dataset(str(out / part))
        runner = Counting()
        check(train, cut(train, out, runner=runner), 2)
        assert len(runner.asked) == units - stop
        assert data_files(out) == data_files(tmp_path / "whole")


def loadable(uri: Path) -> shards.Dataset | None:
    try:
        return shards.load_dataset(str(uri))
    except UserError:
        return None


@pytest.mark.parametrize("earlier", [False, True])
def test_a_death_at_any_change_of_a_file(tmp_path, monkeypatch, earlier):
    """Whatever was written last: what can be loaded is whole, and the same call brings it to the same end."""
    train = write_data(str(tmp_path / "data"), LABELS[:11], [5, 6])
    old = cut(train, tmp_path / "old", seed=1)
    new = cut(train, tmp_path / "new")
    whole = {part.fingerprint: images(part) for part in (*old, *new)}
    for alive in range(100):
        out = tmp_path / f"{alive}"
        if earlier:
            cut(train, out, seed=1)
        left = iter(range(alive))
        with monkeypatch.context() as patch:
            for real in (storage.write_bytes, storage.remove, storage.remove_files):

                def dies(*args, real=real, left=left):
                    if next(left, None) is None:
                        raise KeyboardInterrupt
                    return real(*args)

                patch.setattr(storage, real.__name__, dies)
            try:
                cut(train, out)
                break
            except KeyboardInterrupt:
                pass
        for part in ("train", "val"):
            found = loadable(out / part)
            assert found is None or images(found) == whole[found.fingerprint]
        cut(train, out)
        assert data_files(out) == data_files(tmp_path / "new")
    assert 10 < alive < 99


def test_without_records_the_shards_themselves_are_asked(train, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cut(train, tmp_path / "out", runner=Counting(3))
    storage.remove(str(tmp_path / "out" / "records"))
    runner = Counting()
    check(train, cut(train, tmp_path / "out", runner=runner), 2)
    made = [name for name in data_files(tmp_path / "out") if name.endswith(".parquet")]
    assert len(runner.asked) == len(made) - 3


@pytest.mark.parametrize("damage", ["gone", "cut", "foreign"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_lost_or_damaged_shard_is_made_again(train, tmp_path, part, damage):
    cut(train, tmp_path / "out")
    whole = data_files(tmp_path / "out")
    victim = tmp_path / "out" / part / "part-00000.parquet"
    if damage == "gone":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-7])
    else:
        victim.write_bytes(Path(train.shard_uri(1)).read_bytes())
    runner = Counting()
    cut(train, tmp_path / "out", runner=runner)
    assert runner.asked == [f"{part}-00000"]
    assert data_files(tmp_path / "out") == whole


def test_while_a_shard_is_made_again_nothing_can_be_loaded(train, tmp_path):
    _, val = cut(train, tmp_path / "out")
    Path(val.shard_uri(0)).unlink()

    def runner(rows, stages):
        for part in ("train", "val"):
            with pytest.raises(UserError, match="no imported dataset"):
                shards.load_dataset(str(tmp_path / "out" / part))
        yield from run_serial(rows, stages)

    check(train, cut(train, tmp_path / "out", runner=runner), 2)


@pytest.mark.parametrize(("per_class", "seed"), [(3, 0), (1, 0), (2, 1)])
def test_other_inputs_replace_it(train, tmp_path, per_class, seed):
    cut(train, tmp_path / "new", per_class, seed)
    cut(train, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        cut(train, tmp_path / "out", per_class, seed, runner=Counting(1))
    for part in ("train", "val"):
        with pytest.raises(UserError, match="no imported dataset"):
            shards.load_dataset(str(tmp_path / "out" / part))
    check(train, cut(train, tmp_path / "out", per_class, seed), per_class)
    assert data_files(tmp_path / "out") == data_files(tmp_path / "new")
    # And back, over what another one left.
    check(train, cut(train, tmp_path / "out"), 2)


def test_too_few_images_are_refused_and_nothing_is_touched(train, tmp_path):
    cut(train, tmp_path / "out")
    before = files(tmp_path / "out")
    words = (
        r"^data\.train: class 'bee' has 6 images, but 4 for the search split and 3 for recovery and baselines are "
        r"needed; lower search\.split\.per_class or recover\.ipc$"
    )
    with pytest.raises(UserError, match=words):
        cut(train, tmp_path / "out", 4, need=3)
    with pytest.raises(UserError, match="but 6 for the search split and 1 for recovery"):
        cut(train, tmp_path / "out", 6)
    assert files(tmp_path / "out") == before
    cut(train, tmp_path / "other", 4, need=2)


def test_files_of_others_are_not_touched(train, tmp_path):
    where = tmp_path / "import"
    write_data(str(where / "train"), LABELS, [20])
    before = files(where)
    with pytest.raises(UserError, match=r"^out: .*already holds files of something else"):
        cut(train, where)
    cut(train, tmp_path / "out")
    inner = shards.load_dataset(str(tmp_path / "out" / "train"))
    with pytest.raises(UserError, match=r"^out: .*out holds the training data"):
        cut(inner, tmp_path / "out", 1)
    assert files(where) == before


def test_data_that_contradict_themselves_are_refused(train, tmp_path):
    wrong = dataclasses.replace(train, class_counts=[8, 6, 6])
    with pytest.raises(UserError, match=r"has other labels than its dataset\.json; import it again"):
        cut(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_shard_says_how_to_resume(train, tmp_path, monkeypatch):
    def fails(uri, rows):
        raise MemoryError("too big")

    monkeypatch.setattr(select.shards, "read_rows", fails)
    with pytest.raises(RunError, match=r"(?s)search split: \d of \d failed, .*run the same command again.*too big"):
        cut(train, tmp_path / "out")
    monkeypatch.undo()
    check(train, cut(train, tmp_path / "out"), 2)


def test_a_broken_source_shard_is_named(train, tmp_path):
    cut(train, tmp_path / "out")
    source = Path(train.shard_uri(2))
    data = bytearray(source.read_bytes())
    first = image_bytes(7)
    data[data.index(first) + 5] ^= 1
    source.write_bytes(data)
    with pytest.raises(RunError, match=r"part-00002\.parquet: not a readable Parquet file"):
        cut(train, tmp_path / "again")


def test_stages_read_both(tmp_path):
    rng = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / "src" / name).mkdir(parents=True)
        for index in range(7):
            data = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(data, "PNG")
            (tmp_path / "src" / name / f"{index}.png").write_bytes(data.getvalue())
    import_dataset(open_source(str(tmp_path / "src")), str(tmp_path / "data"), images_per_shard=5, runner=run_serial)
    train = shards.load_dataset(str(tmp_path / "data" / "train"))
    made = cut(train, tmp_path / "out")
    check(train, made, 2)
    spec = DataSpec(16, 3, tuple(train.mean), tuple(train.std), tuple(NAMES))
    pixels = {part.uri: next(RealImages(part, spec).parts()) for part in (*made, train)}
    both = np.concatenate([pixels[part.uri][0].numpy() for part in made])
    assert sorted(x.tobytes() for x in both) == sorted(x.tobytes() for x in pixels[train.uri][0].numpy())
    assert pixels[made[1].uri][1].tolist() == [0, 0, 1, 1, 2, 2]


@st.composite
def labelled(draw) -> tuple[list[int], int]:
    """Labels of three classes, and a split that leaves an image of each."""
    per_class = draw(st.integers(1, 4))
    counts = [draw(st.integers(per_class + 1, per_class + 6)) for _ in NAMES]
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return draw(st.permutations(labels)), per_class


@st.composite
def cuts(draw, count: int) -> list[int]:
    """Rows of shards, of which some may be empty."""
    bounds = sorted(draw(st.lists(st.integers(0, count), max_size=5)))
    return np.diff([0, *bounds, count]).tolist()


@given(st.data(), st.integers(0, 2**40))
def test_the_plan_is_a_function_of_labels_size_and_seed(data, seed):
    labels, per_class = data.draw(labelled())
    chosen = []
    for _ in range(2):
        rows = data.draw(cuts(len(labels)))
        columns = np.split(np.array(labels), np.cumsum(rows)[:-1])
        first = np.cumsum([0, *rows])
        size = data.draw(st.integers(1, 9))
        plan = plan_split(columns, 3, per_class, seed, size)
        held: dict[str, list[int]] = {"train": [], "val": []}
        for each in plan:
            assert len(each.rows) == sum(each.counts) > 0
            held[each.folder] += (np.repeat(first[each.shards], each.counts) + each.rows).tolist()
        val = [each for each in plan if each.folder == "val"]
        assert [len(each.rows) for each in val[:-1]] == [size] * (len(val) - 1)
        assert len(val[-1].rows) <= size
        assert len({each.row()["id"] for each in plan}) == len(plan)
        assert held["train"] == sorted(held["train"])
        assert held["val"] == sorted(held["val"])
        assert sorted(held["train"] + held["val"]) == list(range(len(labels)))
        assert Counter(labels[k] for k in held["val"]) == dict.fromkeys(range(3), per_class)
        chosen.append(held)
    assert chosen[0] == chosen[1], "however the images are cut into shards"


@settings(max_examples=20)
@given(st.data(), st.integers(0, 2**40))
def test_any_data_are_split_whole_whatever_interrupts(data, seed):
    labels, per_class = data.draw(labelled())
    vals = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one", "two"):
            rows = [n for n in data.draw(cuts(len(labels))) if n]
            train = write_data(f"{folder}/{name}", labels, rows)
            stop = data.draw(st.integers(1, 12))
            runner = Counting(stop, backwards=data.draw(st.booleans()))
            try:
                made = cut(train, f"{folder}/{name}-out", per_class, seed, runner)
            except KeyboardInterrupt:
                made = cut(train, f"{folder}/{name}-out", per_class, seed)
            check(train, made, per_class)
            vals.append(images(made[1]))
    assert vals[0] == vals[1]


@pytest.mark.s3
def test_on_s3_it_is_the_same_and_known_by_few_requests(train, tmp_path, s3_server, monkeypatch):
    bucket = f"{s3_server}/{uuid.uuid4().hex}"
    for name, data in files(train.uri).items():
        storage.write_bytes(f"{bucket}/data/{name}", data)
    cut(train, tmp_path / "out")
    remote = shards.load_dataset(f"{bucket}/data")
    cut(remote, f"{bucket}/out")
    for name, data in data_files(tmp_path / "out").items():
        assert storage.read_bytes(f"{bucket}/out/{name}") == data
    calls = []
    from cluster.objectstore import ObjectStore

    real = ObjectStore._request

    async def counting(self, method, *args, **kwargs):
        calls.append(method)
        return await real(self, method, *args, **kwargs)

    monkeypatch.setattr(ObjectStore, "_request", counting)
    split_dataset(remote, f"{bucket}/out", 2, 0, run_serial, RESOURCES)
    assert Counter(calls)["list_objects_v2"] == 4
    assert not {"put_object", "delete_objects", "delete_object"} & set(calls)


@pytest.mark.ray
def test_ray_gives_the_bytes_of_the_serial_runner(train, tmp_path, ray_local):
    cut(train, tmp_path / "one")
    cut(train, tmp_path / "two", runner=run_ray)
    assert data_files(tmp_path / "one") == data_files(tmp_path / "two")
