"""Students through the whole of evaluate on real MNIST images: train, kill, resume, validate, commit."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster import nodecache, shards, storage
from cluster.errors import RunError, UserError
from cluster.progress import read_progress
from cluster.resources import ActorResources, TrainResources
from cluster.rng import generator
from cluster.runner import ActorStage, Row, run_ray, run_serial
from cluster.worker import Worker
from stages.data import DataSpec
from stages.evaluate import train
from stages.evaluate import validate as validate_stage
from stages.evaluate.baselines import choose_real, random_real, random_real_uri
from stages.evaluate.core import new_student
from stages.evaluate.diversity import class_cosine
from stages.evaluate.jobs import StudentJob, plan_jobs
from stages.evaluate.options import EvaluateOptions, Protocol
from stages.evaluate.store import StudentStore
from stages.evaluate.train import train_students
from stages.evaluate.validate import count_correct, validate_students
from stages.images import to_pixels
from stages.imageset import load_image_set
from stages.relabel.options import RelabelOptions
from stages.relabel.store import write_labels
from stages.relabel.unit import LabelUnit
from stages.relabel.views import draw_views
from stages.teachers import pixels
from stages.teachers.options import NetworkSpec

IPC, EPOCHS, SIZE = 3, 4, 28
DEMO = Path(__file__).resolve().parents[2] / "pipeline" / "demo" / "mnist"
CONV = NetworkSpec(arch="builtin:convnet_d3", kwargs={"width": 8})


@dataclass(frozen=True)
class Case:
    """A run directory with distilled-like images and labels, real data, and its jobs."""

    out: str
    data: DataSpec
    train: str
    val: str
    jobs: list[StudentJob]


def copy_part(source: shards.Dataset, uri: str, parts: list[int]) -> None:
    """A real subset of all classes as a dataset of several shards."""
    whole = pa.concat_tables([shards.read_shard(u) for u in source.shard_uris()])
    picks = generator(0, "subset").permutation(len(whole))[: sum(parts)]
    table = whole.take(picks)
    start, names = 0, []
    for index, rows in enumerate(parts):
        part, start = table.slice(start, rows), start + rows
        names.append((f"part-{index:05d}.parquet", rows))
        shards.write_shard(storage.join(uri, names[-1][0]), part, row_group_size=100)
    counts = np.bincount(table["label"].to_numpy(), minlength=10).tolist()
    changes = {"uri": uri, "shards": names, "class_counts": counts}
    shards.save_dataset(dataclasses.replace(source, **changes))


def make_labels(uri: str, data: DataSpec, count: int) -> None:
    """Labels that know the class, two epochs a shard."""
    metadata = {"class_names": list(data.class_names), "identity": "x"}
    for first in range(0, EPOCHS, 2):
        unit = LabelUnit(
            epoch_start=first, epoch_stop=first + 2, position_start=0, position_stop=count, num_images=count
        )
        views = [draw_views(1, epoch, count, SIZE, RelabelOptions()) for epoch in (first, first + 1)]
        logits = generator(0, "logits", first).normal(0, 2, (2 * count, 10))
        logits[np.arange(2 * count), np.concatenate([v.order for v in views]) % 10] += 6
        write_labels(uri, unit, views, logits.astype(np.float16), 10, metadata)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    real = shards.load_dataset(str(DEMO / "train"))
    data = DataSpec(SIZE, 1, tuple(real.mean), tuple(real.std), tuple(real.class_names))
    train_uri, val_uri, out = (str(tmp_path / name) for name in ("train", "val", "out"))
    copy_part(real, train_uri, [150, 210])
    copy_part(shards.load_dataset(str(DEMO / "val")), val_uri, [70, 160])
    assert not any(r["error"] for r in random_real(out, train_uri, data, IPC, 0, ActorResources(), run_serial))
    labels = storage.join(out, "labels")
    make_labels(labels, data, 10 * IPC)
    options = EvaluateOptions(students={"conv": CONV}, seeds=[0, 1], protocol=Protocol(batch=10, val_every=2, lr=0.01))
    fields: dict[str, Any] = {"recipe": "prism", "epochs": EPOCHS, "ipc": IPC, "inputs_sha": "x"}
    jobs = [
        job
        for method in ("prism", "hard_label")
        for job in plan_jobs(options, method, images_uri=random_real_uri(out), labels_uri=labels, **fields)
    ]
    return Case(out, data, train_uri, val_uri, jobs)


def weights(case: Case, job: StudentJob) -> dict[int, bytes]:
    folder = Path(StudentStore(case.out, job).folder)
    return {int(p.stem.split("-")[1]): p.read_bytes() for p in sorted(folder.glob("epoch-*.safetensors"))}


def train_serial(case: Case, jobs: list[StudentJob]) -> list[dict[str, Any]]:
    return train_students(case.out, jobs, case.data, TrainResources(), serial=True)


def validate(case: Case, runner: Any = run_serial) -> list[dict[str, Any]]:
    return validate_students(case.out, case.jobs, case.data, case.val, ActorResources(), runner)


def direct_accuracy(case: Case, job: StudentJob, epoch: int) -> tuple[float, float]:
    """Top-1 and top-5 one image at a time, by sorting."""
    network = new_student(job.student, job.network, case.data, 0).eval()
    network.load_state_dict(StudentStore(case.out, job).load_weights(epoch))
    one = five = total = 0
    for uri in shards.load_dataset(case.val).shard_uris():
        for row in shards.read_shard(uri).to_pylist():
            pixels = torch.from_numpy(to_pixels(row["image"]["bytes"], SIZE, 1))[None]
            with torch.no_grad():
                order = network(case.data.normalise(pixels))[0].argsort(descending=True).tolist()
            one, five, total = one + (order[0] == row["label"]), five + (row["label"] in order[:5]), total + 1
    return 100 * one / total, 100 * five / total


def test_train_validate_commit(case: Case) -> None:
    rows = train_serial(case, case.jobs)
    assert [(r["id"], r["error"]) for r in rows] == [(job.id, "") for job in case.jobs]
    assert {tuple(weights(case, job)) for job in case.jobs} == {(2, 4)}
    records = read_progress(storage.join(case.out, "progress", "train_students"))
    assert {(job.id, EPOCHS, EPOCHS) for job in case.jobs} == {(n, r["done"], r["total"]) for n, r in records.items()}
    assert "hard_label conv seed 1 epoch 4/4" in {record["message"] for record in records.values()}

    job = case.jobs[0]
    expected = {epoch: direct_accuracy(case, job, epoch) for epoch in (2, 4)}
    assert [r["error"] for r in validate(case)] == [""] * len(case.jobs)
    result = json.loads(Path(case.out, "eval", f"{job.id}.json").read_text())
    assert [(p["top1"], p["top5"]) for p in result["curve"]] == [pytest.approx(expected[e]) for e in (2, 4)]
    assert [p["epoch"] for p in result["curve"]] == [2, 4]
    assert result["top1_last"] == pytest.approx(expected[4][0])
    assert result["top1_best"] == pytest.approx(max(expected[2][0], expected[4][0]))
    assert result["top5_last"] == pytest.approx(expected[4][1])
    named = {k: result[k] for k in ("method", "recipe", "student", "protocol", "seed", "ipc", "epochs", "val_images")}
    assert named == {
        "method": "prism", "recipe": "prism", "student": "conv", "protocol": "default", "seed": 0, "ipc": IPC,
        "epochs": EPOCHS, "val_images": 230,
    }  # fmt: skip
    assert result["content_sha"] == job.content_sha
    assert result["curve"][-1]["loss"] > 0
    assert tuple(weights(case, job)) == (4,)
    assert train_serial(case, case.jobs) == []
    assert validate(case) == []


def test_arms_share_initial_weights_and_differ_after(case: Case) -> None:
    soft, hard = case.jobs[0], case.jobs[2]
    assert (soft.seed, hard.seed, soft.student, hard.student) == (0, 0, "conv", "conv")
    train_serial(case, [soft, hard])
    assert weights(case, soft)[4] != weights(case, hard)[4]


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_killed_training_resumes_with_the_same_bytes(case: Case, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """From the state of any epoch, validated (2) or not."""
    train_serial(case, case.jobs[:2])
    whole = [weights(case, job) for job in case.jobs[:2]]
    for job in case.jobs[:2]:
        storage.remove(StudentStore(case.out, job).folder)

    monkeypatch.setattr(train, "STATE_INTERVAL_S", 0.0)
    epochs = []

    class Killed(BaseException):
        pass

    original = train.train_student

    def dies(training: Any, read: Any) -> Any:
        for student in original(training, read):
            epochs.append(student.epoch)
            if len(epochs) == EPOCHS + kept + 1:  # the second job, before the next state
                raise Killed
            yield student

    monkeypatch.setattr(train, "train_student", dies)
    with pytest.raises(Killed):
        train_serial(case, case.jobs[:2])
    rows = train_serial(case, case.jobs[:2])
    assert [r["id"] for r in rows] == [case.jobs[1].id]
    assert epochs == [1, 2, 3, 4, *range(1, kept + 2), *range(kept + 1, EPOCHS + 1)]
    assert [weights(case, job) for job in case.jobs[:2]] == whole
    losses = StudentStore(case.out, case.jobs[1]).trained()["losses"]
    assert len(losses) == EPOCHS
    assert not Path(StudentStore(case.out, case.jobs[1]).folder, "state.pt").exists()


def test_results_of_another_configuration_are_redone(case: Case) -> None:
    job = case.jobs[0]
    train_serial(case, [job])
    other = job.model_copy(update={"inputs_sha": "y"})
    assert [r["id"] for r in train_serial(case, [other])] == [job.id]


def test_a_diverging_student_does_not_stop_the_others(case: Case) -> None:
    wild = case.jobs[0].protocol.model_copy(update={"lr": 1e15, "optimizer": "sgd", "name": "wild"})
    bad = case.jobs[0].model_copy(update={"protocol": wild})
    rows = train_serial(case, [bad, case.jobs[1]])
    assert rows[0]["id"] == bad.id
    assert "lower evaluate.protocol.lr" in rows[0]["error"]
    assert rows[1] == {"id": case.jobs[1].id, "error": ""}
    assert [r["id"] for r in validate_students(
        case.out, [bad, case.jobs[1]], case.data, case.val, ActorResources(), run_serial
    )] == [case.jobs[1].id]  # fmt: skip


def test_what_a_lost_group_had_trained_counts(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(loop: Any, config: dict[str, Any], jobs: int, settled: None, **_: Any) -> None:
        loop(config, [0], Worker())
        raise RunError("students-0: gone")

    monkeypatch.setattr("cluster.training.run_trainers", lose)
    monkeypatch.setattr("cluster.training.settle", lambda *_: None)
    rows = train_students(case.out, case.jobs[:2], case.data, TrainResources(threads=1))
    assert [row["error"] for row in rows] == ["", "students-0: gone"]


def test_unreadable_validation_image_is_named(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Where nobody has decoded it before.
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path_factory.mktemp("cache")))
    train_serial(case, case.jobs[:1])
    uri = storage.join(case.val, "part-00001.parquet")
    table = shards.read_shard(uri)
    images = table["image"].to_pylist()
    images[5] = {"bytes": images[5]["bytes"][:40], "path": "five.png"}
    column = pa.array(images, shards.IMAGE_TYPE)
    shards.write_shard(uri, table.set_column(0, table.schema.field("image"), column))
    (row,) = validate_students(case.out, case.jobs[:1], case.data, case.val, ActorResources(), run_serial)
    assert "part-00001.parquet from row 0: row 5 is not a readable image" in row["error"]
    assert not Path(case.out, "eval", f"{case.jobs[0].id}.json").exists()


def test_actors_of_a_node_fetch_and_decode_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    job = case.jobs[0]
    train_serial(case, [job])
    remote, val = "memory://node/out", "memory://node/val"
    for source, target in ((StudentStore(case.out, job).folder, StudentStore(remote, job).folder), (case.val, val)):
        for name in storage.list_files(source):
            storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(source, name)))
    fetched: Counter[str] = Counter()
    real = storage.download

    def counting(uri: str, target: Path, size: int) -> None:
        fetched[uri] += 1
        real(uri, target, size)

    decoded = []
    decode = pixels.decode_rows
    monkeypatch.setattr(pixels, "decode_rows", lambda *arguments: decoded.append(arguments[2]) or decode(*arguments))
    monkeypatch.setattr(storage, "download", counting)
    monkeypatch.setattr(nodecache, "JITTER_S", 0)
    monkeypatch.setattr(validate_stage, "SLICE_ROWS", 50)
    rows, arguments = [], ([job.model_dump_json()], case.data)
    slices = list(validate_stage._slices(shards.load_dataset(case.val)))
    assert len(slices) == 6
    # The last finds the same images decoded, wherever they lie.
    for out, dataset in ((remote, val), (remote, val), (case.out, case.val)):
        actor = validate_stage.ValidateStage(out, *arguments, dataset, gpu=False)
        rows.append(
            [actor({"id": "x", "job": 0, "shard": k, "start": start, "stop": stop}) for k, start, stop in slices]
        )
    assert rows[0] == rows[1] == rows[2]
    files = [StudentStore(remote, job).weights_uri(epoch) for epoch in (2, 4)]
    assert fetched == dict.fromkeys([*files, *(f"{val}/part-0000{k}.parquet" for k in range(2))], 1)
    assert len(decoded) == len(set(decoded)) == 6


def test_top_five_of_three_classes_is_everything(case: Case) -> None:
    data = DataSpec(SIZE, 1, (0.0,), (1.0,), ("a", "b", "c"))
    network = new_student("x", CONV, data, 0).eval()
    pixels = torch.randint(0, 256, (7, 1, SIZE, SIZE), dtype=torch.uint8)
    assert count_correct(network, pixels, torch.arange(7) % 3, data, "fp32")[1] == 7


def test_random_real_images_are_the_chosen_ones(case: Case) -> None:
    dataset = shards.load_dataset(case.train)
    chosen = choose_real(shards.labels_of(dataset), 10, IPC, 0)
    images = load_image_set(random_real_uri(case.out), case.data)
    assert len(images) == 10 * IPC
    tables = [shards.read_shard(uri).to_pylist() for uri in dataset.shard_uris()]
    for image_id in range(10 * IPC):
        shard, row = chosen[image_id % 10][image_id // 10]
        assert tables[shard][row]["label"] == image_id % 10 == images.labels[image_id]
        expected = to_pixels(tables[shard][row]["image"]["bytes"], SIZE, 1)
        assert np.array_equal(images.images[image_id].numpy(), expected)
    assert all(len(set(picks)) == IPC for picks in chosen)
    assert choose_real(shards.labels_of(dataset), 10, IPC, 1) != chosen
    assert choose_real(shards.labels_of(dataset), 10, IPC, 0, draw=1) != chosen
    pixels = images.images.flatten(1).double().numpy()
    assert class_cosine(pixels.__getitem__, images.labels.numpy())["cosine_mean"] > 0


def test_random_real_resumes_and_follows_the_configuration(case: Case) -> None:
    folder = Path(random_real_uri(case.out))
    parts = sorted(folder.iterdir())
    before = {p.name: p.read_bytes() for p in parts}
    arguments = (case.train, case.data)
    assert random_real(case.out, *arguments, IPC, 0, ActorResources(), run_serial) == []
    parts[0].write_bytes(before[parts[0].name][:100])
    rows = random_real(case.out, *arguments, IPC, 0, ActorResources(), run_serial)
    assert [r["id"] for r in rows] == [parts[0].stem]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    random_real(case.out, *arguments, 1, 0, ActorResources(), run_serial)
    assert len(load_image_set(str(folder), case.data)) == 10


def test_fewer_images_than_ipc_names_the_class(case: Case) -> None:
    with pytest.raises(UserError, match=r"class \d has \d+ images, fewer than ipc = 60; lower ipc"):
        random_real(case.out, case.train, case.data, 60, 0, ActorResources(), run_serial)


def test_serial_training_keeps_to_its_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    found = []
    monkeypatch.setattr(train, "train_job", lambda *args: found.append(torch.get_num_threads()))
    for threads in (1, None):
        train_students(case.out, case.jobs[:1], case.data, TrainResources(threads=threads), serial=True)
    assert found == [1, 2]
    assert torch.get_num_threads() == 2


def test_copying_reserves_no_gpu(case: Case) -> None:
    stages = []

    def runner(rows: list[Row], chain: list[ActorStage]) -> Iterator[Row]:
        stages.extend(chain)
        return run_serial(rows, chain)

    random_real(case.out, case.train, case.data, IPC, 1, ActorResources(gpus=1, cpus=2), runner)
    assert [(s.resources.gpus, s.resources.cpus) for s in stages] == [(0, 2)]


@pytest.mark.ray
def test_ray_equals_serial(case: Case, ray_local: None) -> None:
    jobs = case.jobs[:2]
    train_serial(case, jobs)
    serial = [weights(case, job) for job in jobs]
    for job in jobs:
        storage.remove(StudentStore(case.out, job).folder)
    rows = train_students(case.out, jobs, case.data, TrainResources(threads=1))
    assert [r["error"] for r in rows] == ["", ""]
    assert [weights(case, job) for job in jobs] == serial
    expected = [direct_accuracy(case, job, 4) for job in jobs]
    assert [r["error"] for r in validate(case, run_ray)] == ["", ""]
    for job, (one, five) in zip(jobs, expected, strict=True):
        result = StudentStore(case.out, job).result()
        assert (result["top1_last"], result["top5_last"]) == pytest.approx((one, five))


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_share_every_batch(case: Case, ray_local: None) -> None:
    """Without BatchNorm, the average of the shares' gradients is the whole batch's."""
    plain = NetworkSpec(arch=f"user:{Path(__file__).with_name('evaluate_linear.py')}:linear")
    protocol = case.jobs[0].protocol.model_copy(update={"optimizer": "sgd", "batch": 13})
    job = case.jobs[0].model_copy(update={"network": plain, "protocol": protocol})
    train_serial(case, [job])
    alone = StudentStore(case.out, job).load_weights(EPOCHS)
    losses = StudentStore(case.out, job).trained()["losses"]
    storage.remove(StudentStore(case.out, job).folder)
    rows = train_students(case.out, [job], case.data, TrainResources(workers=2, cpus=0.4, threads=1))
    assert rows == [{"id": job.id, "error": ""}]
    together = StudentStore(case.out, job).load_weights(EPOCHS)
    for name, value in alone.items():
        assert together[name].numpy() == pytest.approx(value.numpy(), abs=1e-5), name
    assert StudentStore(case.out, job).trained()["losses"] == pytest.approx(losses, rel=1e-5)
