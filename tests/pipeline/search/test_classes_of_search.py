"""Rungs on some of the classes: which these are, their datasets, and that teachers answer for them alone."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from spaces_of_search import space_of

from cluster import shards, storage
from cluster.errors import UserError
from cluster.resources import ActorResources
from cluster.runner import run_serial
from pipeline.config import DataConfig
from pipeline.loading import load_config
from pipeline.preflight import preflight
from pipeline.run import execute
from pipeline.search.bench import Bench
from pipeline.search.classes import cut_classes, draw_classes
from pipeline.search.measure import _run, lighten, look_up, measure
from pipeline.search.space import make_space
from pipeline.search.trial import PREPARED, Measured, Trial
from stages.data import DataSpec
from stages.squeeze.data import RealImages
from stages.teachers.build import build_network
from stages.teachers.options import TeacherSpec
from stages.teachers.teacher import load_teacher

NAMES = [f"class {letter}" for letter in "abcdefg"]
SEARCH = {
    "space": {"recover.r_bn": {"log": [0.1, 100]}},
    "rungs": [{"classes": 2, "recover.iterations": 2}, {"recover.iterations": 2}, {"classes": 3}, {}],
}


@given(st.integers(2, 200), st.integers(0, 2**40), st.data())
def test_fewer_classes_are_a_part_of_more(num_classes, seed, data) -> None:
    few = data.draw(st.integers(1, num_classes))
    many = data.draw(st.integers(few, num_classes))
    drawn = draw_classes(num_classes, many, seed)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == many
    assert set(draw_classes(num_classes, few, seed)) <= set(drawn) <= set(range(num_classes))
    assert draw_classes(num_classes, num_classes, seed) == list(range(num_classes))


def test_the_seed_draws_and_every_class_can_be_meant() -> None:
    drawn = [tuple(draw_classes(7, 3, seed)) for seed in range(60)]
    assert drawn == [tuple(draw_classes(7, 3, seed)) for seed in range(60)]
    assert len(set(drawn)) > 20
    assert set(range(7)) == {label for labels in drawn for label in labels}


def write_data(uri: Path, rows: list[int]) -> shards.Dataset:
    """Small real images of seven classes in turns, in shards of so many rows."""
    rng, made, start = np.random.default_rng(len(rows)), [], 0
    for index, count in enumerate(rows):
        records = []
        for k in range(start, start + count):
            data = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(data, "PNG")
            records.append({"image": {"bytes": data.getvalue(), "path": f"{k}.png"}, "label": k * 3 % 7})
        name = f"part-{index:05d}.parquet"
        table = pa.Table.from_pylist(records, schema=shards.image_schema(NAMES))
        shards.write_shard(storage.join(str(uri), name), table, row_group_size=4)
        made.append((name, count))
        start += count
    counts = Counter(k * 3 % 7 for k in range(start))
    found = shards.Dataset(
        str(uri), NAMES, 3, (8, 8), [0.1, 0.2, 0.3], [0.3] * 3, made, [counts[k] for k in range(7)], f"print {rows}"
    )
    shards.save_dataset(found)
    return found


def images(dataset: shards.Dataset) -> list[tuple[str, bytes, str]]:
    """(path, bytes, class name) of every image in order."""
    tables = [shards.read_shard(uri) for uri in dataset.shard_uris()]
    assert [len(table) for table in tables] == [rows for _, rows in dataset.shards]
    rows = [row for table in tables for row in table.to_pylist()]
    return [(row["image"]["path"], row["image"]["bytes"], dataset.class_names[row["label"]]) for row in rows]


def cut(train: shards.Dataset, val: shards.Dataset, out: Path, count: int, seed: int = 0, runner=run_serial):
    data = DataConfig(train=train.uri, val=val.uri, image_size=8)
    made = cut_classes(data, str(out), count, seed, runner, ActorResources())
    return [shards.load_dataset(uri) for uri in (made.train, made.val)]


@pytest.fixture
def both(tmp_path) -> list[shards.Dataset]:
    return [write_data(tmp_path / "train", [11, 3, 1, 9, 8]), write_data(tmp_path / "val", [14])]


def test_the_images_of_the_classes_are_there_as_they_were(both, tmp_path) -> None:
    made = cut(*both, tmp_path / "out", 3)
    classes = draw_classes(7, 3, 0)
    for source, found in zip(both, made, strict=True):
        assert found.class_names == [NAMES[label] for label in classes]
        assert images(found) == [image for image in images(source) if image[2] in found.class_names]
        assert found.class_counts == [source.class_counts[label] for label in classes]
        assert sum(found.class_counts) == found.num_images
        assert (found.mean, found.std, found.channels) == (source.mean, source.std, source.channels)
        schema = shards.read_shard(found.shard_uri(0)).schema
        assert schema.remove_metadata().equals(shards.read_shard(source.shard_uri(0)).schema.remove_metadata())
        assert shards.shard_metadata(found.shard_uri(0))["class_names"] == found.class_names
        # In as few files as the source's size allows.
        assert all(rows == max(n for _, n in source.shards) for _, rows in found.shards[:-1])
        spec = DataSpec(8, 3, tuple(found.mean), tuple(found.std), tuple(found.class_names))
        labels = np.concatenate([part[1].numpy() for part in RealImages(found, spec).parts()])
        assert sorted(labels.tolist()) == sorted(np.repeat(range(3), found.class_counts).tolist())


def test_classes_seed_and_data_are_in_the_fingerprint(both, tmp_path) -> None:
    cuts = [(3, 0), (4, 0), (3, 1)]
    made = [cut(*both, tmp_path / f"{count}-{seed}", count, seed) for count, seed in cuts]
    other = replace(both[0], fingerprint="another")
    shards.save_dataset(other)
    made.append(cut(other, both[1], tmp_path / "other", 3))
    prints = {part.fingerprint for pair in [*made, both] for part in pair}
    # The other training data share the validation data.
    assert len(prints) == 2 * len(cuts) + 1 + 2


def test_what_was_finished_is_kept(both, tmp_path) -> None:
    asked: list[str] = []

    def stopping(rows, stages):
        for index, row in enumerate(run_serial(rows, stages)):
            asked.append(row["id"])
            yield row
            if index == 0:
                raise KeyboardInterrupt

    whole = cut(*both, tmp_path / "whole", 5)
    units = sum(len(part.shards) for part in whole)
    assert units > 2
    with pytest.raises(KeyboardInterrupt):
        cut(*both, tmp_path / "out", 5, runner=stopping)
    for part in ("train", "val"):
        with pytest.raises(UserError, match="no imported dataset"):
            shards.load_dataset(str(tmp_path / "out" / part))

    def counting(rows, stages):
        asked.extend(row["id"] for row in rows)
        return run_serial(rows, stages)

    made = cut(*both, tmp_path / "out", 5, runner=counting)
    assert len(asked) == len(set(asked)) == units
    assert [images(part) for part in made] == [images(part) for part in whole]
    assert cut(*both, tmp_path / "out", 5, runner=None) == made
    # Of other data the old shards are no part.
    assert cut(both[1], both[1], tmp_path / "out", 5)[0].num_images == made[1].num_images


# Jobs


@pytest.fixture
def bench(tiny_config, tmp_path) -> Bench:
    """Of a search whose teachers are trained on all three classes; the data are its own split."""
    config = load_config(str(tiny_config(search=SEARCH, data={"num_classes": 3, "class_names": ["ant", "bee", "cat"]})))
    prepared = config.model_copy(update={"out": str(tmp_path / "search" / PREPARED), "search": None})
    execute(prepared, ["squeeze"], serial=True)
    ready = preflight(prepared)
    data = cut_classes(config.data, str(tmp_path / "two"), 2, config.seed, run_serial, ActorResources())
    space = make_space(config, ["res", "conv"], 3)
    return Bench(space, config.search, ready.networks, ready.students, 3, False, {2: data})


def test_a_rung_of_fewer_classes_is_planned_to_cost_less_and_measured_apart(bench, tmp_path) -> None:
    root, point = str(tmp_path / "search"), bench.space.point(bench.space.defaults())
    assert [bench.classes(rung) for rung in range(4)] == [2, 3, 3, 3]
    few, more = bench.planned(point, 0), bench.planned(point, 1)
    assert few[0] < more[0]
    assert few[1] == pytest.approx(more[1] * 2 / 3)

    found = [measure(root, bench.config(point, rung), f"00000-{rung}") for rung in (0, 1)]
    # Other images, so none shared and other records.
    assert [each.units_shared for each in found] == [0, 0]
    assert len(list((tmp_path / "search" / "measured").iterdir())) == 2
    for rung in (0, 1):
        assert look_up(root, bench.config(point, rung)) is not None
    # All classes said aloud are all classes.
    assert bench.config(point, 2) == bench.config(point, 3)
    assert look_up(root, bench.config(point, 2)) is None


def test_what_a_job_of_fewer_classes_makes(bench, tmp_path, monkeypatch) -> None:
    """Images, labels and students of two classes, by teachers of three."""
    from pipeline.search import measure as module

    kept: dict[str, list] = {}

    def look(uri: str) -> None:
        folder = Path(uri)
        if folder.parent.name == "jobs":
            tables = {name: sorted((folder / name).rglob("*.parquet")) for name in ("recovered", "labels/distilled")}
            kept.update({name: [shards.read_shard(str(p)) for p in paths] for name, paths in tables.items()})
            kept["metadata"] = [shards.shard_metadata(str(tables["recovered"][0]))]
        remove(uri)

    remove = module.storage.remove
    monkeypatch.setattr(module.storage, "remove", look)
    measure(str(tmp_path / "search"), bench.config({}, 0), "00000-0")
    images = pa.concat_tables(kept["recovered"])
    assert Counter(images["label"].to_pylist()) == {0: 2, 1: 2}
    names = [["ant", "bee", "cat"][label] for label in draw_classes(3, 2, 0)]
    assert kept["metadata"][0]["class_names"] == names
    assert {len(logits) for table in kept["labels/distilled"] for logits in table["logits"].to_pylist()} == {2}


def test_teachers_answer_by_the_outputs_of_the_jobs_classes(tiny_config, tmp_path, monkeypatch) -> None:
    """One that the search trained, and one of a user's that knows more classes and says which output is which."""
    index = {"bee": 4, "ant": 0, "cat": 2}
    own = {"arch": "builtin:resnet10", "kwargs": {"width": 4}}
    given = str(tmp_path / "given.safetensors")
    save_file(build_network(TeacherSpec(**own), 5, 3, seed=1).state_dict(), given)
    # Nobody has trained it.
    monkeypatch.setattr("stages.squeeze.stage.guesses", lambda *a: False)
    teachers = {"own": {**own, "weights": given, "num_outputs": 5, "class_index": index}}
    root = str(tmp_path / "search")
    config = load_config(str(tiny_config(out=f"{root}/{PREPARED}", teachers=teachers)))
    execute(config, ["squeeze"], serial=True)

    two = cut_classes(config.data, f"{root}/two", 2, 0, run_serial, ActorResources())
    few = config.model_copy(update={"data": two})
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    chosen = draw_classes(3, 2, 0)
    for name in ("res", "own"):
        logits = []
        for each in (config, few):
            run = _run(root, lighten(each, 1, False, [0]), "job")
            logits.append(load_teacher(name, run.teachers[name], run.ready.data)(x))
        assert torch.equal(logits[1], logits[0][:, chosen])
        assert logits[0].shape == (4, 3)
        if name == "own":
            run = _run(root, lighten(few, 1, False, [0]), "job")
            whole = load_teacher(name, run.teachers[name], run.ready.data).forward_full(x)
            assert torch.equal(logits[1], whole[:, [[0, 4, 2][label] for label in chosen]])


def test_a_sampler_hears_of_rungs_on_one_scale() -> None:
    """Students of few classes get the images of all others wrong, so what ends early is not what does best."""
    rungs = [{"classes": 5}, {"classes": 10}, {}]
    space = space_of(SEARCH["space"], rungs)
    bench = Bench(space, space.config.search, {}, {}, 10)
    at = [Measured(top1=top1, top1_seeds=[top1], seconds=1.0) for top1 in (60.0, 40.0, 50.0)]

    def heard(number: int, state: str) -> Measured | None:
        return bench.lesson(Trial(number=0, params={}, point={}, rungs=at[:number], state=state))

    assert heard(1, "stopped").top1 == 30.0
    assert heard(2, "stopped") == at[1]
    assert heard(3, "finished") == at[2]
    assert heard(1, "failed") is None
