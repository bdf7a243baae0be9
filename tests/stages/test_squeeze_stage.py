"""The squeeze stage on real MNIST images: train, adopt, cache, kill and resume, serial and through Ray Train."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch

from cluster import shards, storage
from cluster.errors import RunError, UserError
from cluster.progress import read_progress
from cluster.resources import Settled, TrainResources
from cluster.rng import generator
from stages.data import DataSpec
from stages.squeeze import stage
from stages.squeeze.jobs import plan_job
from stages.squeeze.options import SqueezeOptions
from stages.squeeze.stage import squeeze_teachers
from stages.teachers.card import TeacherCard, read_card
from stages.teachers.options import TeacherSpec
from stages.teachers.pretrained import Pretrained
from stages.teachers.teacher import load_teacher

DEMO = Path(__file__).resolve().parents[2] / "pipeline" / "demo" / "mnist"
RES = TeacherSpec(arch="builtin:resnet10", kwargs={"width": 4})
CONV = TeacherSpec(arch="builtin:convnet_d3", kwargs={"width": 8}, epochs=1, lr=0.1)
OPTIONS = SqueezeOptions(epochs=2, batch=32, lr=0.05, flip=False, crop_padding=1)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """Real data and a call of the stage."""

    train: str
    val: str
    data: DataSpec

    def __call__(self, out: Path, teachers: dict[str, TeacherSpec], options: SqueezeOptions = OPTIONS, **kwargs: Any):
        resources = TrainResources(threads=1, gpus=0)
        kwargs = {"serial": True, **kwargs}
        squeeze_teachers(str(out), teachers, self.data, self.train, self.val, options, resources, 7, **kwargs)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    """600 training and 200 validation digits out of the demo's."""
    uris = []
    for split, count in (("train", 600), ("val", 200)):
        source = shards.load_dataset(str(DEMO / split))
        whole = pa.concat_tables([shards.read_shard(u) for u in source.shard_uris()])
        table = whole.take(generator(0, "subset").permutation(len(whole))[:count])
        uri = str(tmp_path_factory.mktemp(split))
        shards.write_shard(storage.join(uri, "part-00000.parquet"), table)
        counts = np.bincount(table["label"].to_numpy(), minlength=10).tolist()
        changes = {"uri": uri, "shards": [("part-00000.parquet", count)], "class_counts": counts}
        shards.save_dataset(dataclasses.replace(source, **changes))
        uris.append(uri)
    data = shards.load_dataset(uris[0])
    return Case(*uris, DataSpec(28, 1, tuple(data.mean), tuple(data.std), tuple(data.class_names)))


def digests(out: Path) -> dict[str, str]:
    return {
        f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted((out / "teachers").rglob("*"))
        if p.is_file()
    }


def card(out: Path, name: str) -> TeacherCard:
    found = read_card(str(out / "teachers" / name))
    assert found is not None
    return found


def test_trains_what_is_missing(case, tmp_path):
    case(tmp_path, {"res": RES, "conv": CONV})
    found = card(tmp_path, "res")
    content = (tmp_path / "teachers" / "res" / "model.safetensors").read_bytes()
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.bn_channels == [4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32]
    assert (found.origin, found.input_size, found.mean) == ("squeeze", 28, list(case.data.mean))
    assert found.class_names == list(case.data.class_names)
    assert found.parameters == sum(v.numel() for k, v in safetensors.torch.load(content).items() if is_weight(k))
    assert (found.train_images, found.val_images) == (600, 200)
    # Three times as good as guessing after 36 steps.
    assert found.val_top1 > 0.3
    records = read_progress(str(tmp_path / "progress" / "squeeze"))
    assert {name: (r["done"], r["total"]) for name, r in records.items()} == {"res": (2, 2), "conv": (1, 1)}
    assert "conv epoch 1/1 val" in records["conv"]["message"]
    assert not (tmp_path / "progress" / "squeeze-states").exists()
    # The run's later stages load the same network.
    spec = RES.model_copy(update={"weights": str(tmp_path / "teachers" / "res" / "model.safetensors")})
    teacher = load_teacher("res", spec, case.data)
    assert stage.top1(teacher, shards.load_dataset(case.val)).top1 == pytest.approx(found.val_top1)
    before = digests(tmp_path)
    case(tmp_path, {"res": RES, "conv": CONV})
    assert digests(tmp_path) == before


def is_weight(key: str) -> bool:
    return not key.endswith(("running_mean", "running_var", "num_batches_tracked"))


class Killed(BaseException):
    """Ends the process's work as a kill would: nothing is cleaned up by the code under test."""


@pytest.mark.parametrize("after", [1, 2, 3])
def test_killed_and_resumed_equals_uninterrupted(case, tmp_path, monkeypatch, after):
    """Killed after the state of some epoch was kept: the same weights and cards, and no epoch is trained twice."""
    teachers = {"conv": CONV, "res": RES}
    case(tmp_path / "whole", teachers)
    write = storage.write_bytes
    saves = []

    def write_or_die(uri, content):
        write(uri, content)
        if uri.endswith(".pt"):
            saves.append((Path(uri).stem, torch.load(io.BytesIO(content), weights_only=True)["epoch"]))
            if len(saves) == after:
                raise Killed

    monkeypatch.setattr(storage, "write_bytes", write_or_die)
    with pytest.raises(Killed):
        case(tmp_path / "killed", teachers)
    case(tmp_path / "killed", teachers)
    assert saves == [("conv", 1), ("res", 1), ("res", 2)]
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_name_and_seed_make_the_teacher(case, tmp_path):
    case(tmp_path, {"a": CONV, "b": CONV})
    found = digests(tmp_path)
    assert found["a/model.safetensors"] != found["b/model.safetensors"]


def test_cache_is_looked_up_by_content(case, tmp_path, monkeypatch):
    options = OPTIONS.model_copy(update={"cache": str(tmp_path / "cache")})
    case(tmp_path / "first", {"a": CONV}, options)
    trained = []
    original = stage.train_teacher
    monkeypatch.setattr(stage, "train_teacher", lambda *args: trained.append(args[1].name) or original(*args))
    case(tmp_path / "second", {"a": CONV}, options)
    assert trained == []
    assert digests(tmp_path / "second") == digests(tmp_path / "first")
    case(tmp_path / "third", {"a": CONV, "b": CONV}, options)
    assert trained == ["b"]
    case(tmp_path / "fourth", {"a": CONV.model_copy(update={"lr": 0.2})}, options)
    assert trained == ["b", "a"]
    # A damaged entry is not taken.
    for file in (tmp_path / "cache").rglob("model.safetensors"):
        file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    case(tmp_path / "fifth", {"a": CONV}, options)
    assert trained == ["b", "a", "a"]
    assert digests(tmp_path / "fifth") == digests(tmp_path / "first")


def test_what_the_cache_key_depends_on(tmp_path):
    data = DataSpec(28, 1, (0.1,), (0.3,), ("a", "b"))

    here = Settled(groups=1, workers=1, threads=1, cpus=0.9, gpus=0)

    def job(name="a", spec=CONV, options=OPTIONS, data=data, prints=("x", "y"), seed=0, settled=here):
        return plan_job(name, spec, options, data, list(prints), seed, settled)

    def key(**change):
        return job(**change).key

    (tmp_path / "mine.py").write_text("def make(num_classes): ...")
    user = TeacherSpec(arch=f"user:{tmp_path / 'mine.py'}:make")
    keys = [
        key(),
        key(name="b"),
        key(spec=CONV.model_copy(update={"kwargs": {"width": 9}})),
        key(spec=CONV.model_copy(update={"epochs": 5})),
        key(options=OPTIONS.model_copy(update={"batch": 33})),
        key(data=dataclasses.replace(data, mean=(0.2,))),
        key(options=OPTIONS.model_copy(update={"precision": "bf16"})),
        key(prints=("x", "z")),
        key(prints=("z", "y")),
        key(seed=1),
        key(spec=user),
    ]
    (tmp_path / "mine.py").write_text("def make(num_classes): return 1")
    keys.append(key(spec=user))
    assert len(set(keys)) == len(keys)
    # The machine decides on the last bits, but not on what was asked for; nor does the validation data.
    changes: list[dict[str, Any]] = [{"workers": 2}, {"threads": 2}, {"threads": 3}, {"gpus": 1.0}]
    machines = [dataclasses.replace(here, **change) for change in changes]
    assert len({key(), *(key(settled=m) for m in machines)}) == 5
    assert {job(settled=m).settings for m in machines} == {job().settings, job(prints=("x", "z")).settings}
    assert job(prints=("z", "y")).settings != job().settings
    assert key() == key(settled=dataclasses.replace(here, cpus=2.0, groups=4))
    on_gpu = dataclasses.replace(here, gpus=1.0)
    assert key(settled=on_gpu) == key(settled=dataclasses.replace(on_gpu, gpus=0.2))
    assert key() == key(options=OPTIONS.model_copy(update={"cache": "elsewhere", "epochs": 9, "lr": 9.0}))


@pytest.fixture(scope="module")
def given(case, tmp_path_factory) -> Path:
    """A teacher trained by another program: foreign names, another class order, more classes."""
    out = tmp_path_factory.mktemp("given")
    case(out, {"conv": CONV.model_copy(update={"epochs": 5})})
    state = safetensors.torch.load((out / "teachers" / "conv" / "model.safetensors").read_bytes())
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    foreign = {k.replace("features", "net.body"): v for k, v in state.items()}
    for key in ("head.weight", "head.bias"):
        foreign[key] = torch.cat([state[key][order], torch.full_like(state[key][:2], -1e3)])
    torch.save({"model": foreign}, out / "foreign.pt")
    return out


def test_given_weights_are_adopted(case, given, tmp_path):
    spec = TeacherSpec(
        arch=CONV.arch,
        kwargs=CONV.kwargs,
        weights=str(given / "foreign.pt"),
        key_map={"state_key": "model", "rename": [("^net.body", "features")]},
        num_outputs=12,
        class_index={name: 9 - k for k, name in enumerate(case.data.class_names)},
    )
    case(tmp_path, {"res": CONV, "given": spec})
    found, source = card(tmp_path, "given"), card(given, "conv")
    assert (found.val_top1, found.train_top1) == (source.val_top1, source.train_top1)
    assert (found.num_outputs, found.class_names) == (12, None)
    assert found.origin == str(given / "foreign.pt")
    # Later stages need neither key map nor class index: weights and card say it all.
    copied = spec.model_copy(
        update={
            "weights": str(tmp_path / "teachers" / "given" / "model.safetensors"),
            "key_map": TeacherSpec(arch="x").key_map,
        }
    )
    again = load_teacher("given", copied, case.data)
    assert stage.top1(again, shards.load_dataset(case.val)).top1 == pytest.approx(source.val_top1)


def test_bad_given_weights_stop_before_any_training(case, given, tmp_path):
    spec = TeacherSpec(arch=CONV.arch, kwargs=CONV.kwargs, weights=str(given / "foreign.pt"))
    with pytest.raises(UserError, match=r"teachers\.given.*key_map\.state_key"):
        case(tmp_path, {"res": RES, "given": spec})
    assert not (tmp_path / "teachers").exists()


def given_spec(given: Path, **change: Any) -> TeacherSpec:
    weights = str(given / "teachers" / "conv" / "model.safetensors")
    return TeacherSpec(**{"arch": CONV.arch, "kwargs": CONV.kwargs, "weights": weights, **change})


def test_given_weights_that_guess_leave_nothing_behind(case, given, tmp_path):
    """Classes in another order: refused before a card says that the teacher is complete, so it can be put right."""
    names = list(case.data.class_names)
    wrong = given_spec(given, class_index={name: (k + 1) % 10 for k, name in enumerate(names)}, num_outputs=10)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"teachers\.g: top-1 .* no better than guessing \(10\.0 %\); check its weights"
        ):
            case(tmp_path, {"g": wrong})
        assert digests(tmp_path) == {}
    case(tmp_path, {"g": given_spec(given)})
    assert card(tmp_path, "g").val_top1 == card(given, "conv").val_top1


def test_trained_teachers_may_guess(case, tmp_path):
    case(tmp_path, {"slow": CONV.model_copy(update={"lr": 1e-9})})
    assert card(tmp_path, "slow").val_top1 < 0.25


def test_a_finished_teacher_of_other_weights_is_refused(case, given, tmp_path):
    file = tmp_path / "mine.safetensors"
    content = (given / "teachers" / "conv" / "model.safetensors").read_bytes()
    file.write_bytes(content)
    spec = given_spec(given, weights=str(file))
    out = tmp_path / "out"
    case(out, {"g": spec})
    assert card(out, "g").origin_sha256 == hashlib.sha256(content).hexdigest()
    before = digests(out)
    # The same file elsewhere is the same teacher, and so is one that was deleted since.
    case(out, {"g": given_spec(given)})
    case(out, {"g": spec.model_copy(update={"weights": str(tmp_path / "gone.safetensors")})})
    state = safetensors.torch.load(content)
    state["head.bias"] += 1e-3
    file.write_bytes(safetensors.torch.save(state))
    for other in (spec, given_spec(given, weights="pretrained"), given_spec(given, weights=None)):
        with pytest.raises(UserError, match=r"^teachers\.g: .*/teachers/g was made from other weights.*another out$"):
            case(out, {"g": other})
        assert digests(out) == before
    file.write_bytes(content)
    case(out, {"g": spec})
    assert digests(out) == before


def test_a_finished_teacher_of_other_code_is_refused(case, given, tmp_path):
    text = (
        "from stages.teachers.networks import NETWORKS\n"
        "def net(num_classes, **kwargs):\n"
        "    return NETWORKS['convnet_d3'](num_classes=num_classes, in_chans=1, **kwargs)\n"
    )
    file = tmp_path / "net.py"
    file.write_text(text)
    spec = given_spec(given, arch=f"user:{file}:net")
    out = tmp_path / "out"
    case(out, {"g": spec})
    moved = tmp_path / "elsewhere" / "net.py"
    moved.parent.mkdir()
    moved.write_text(text)
    case(out, {"g": given_spec(given, arch=f"user:{moved}:net")})
    file.write_text(text + "# changed")
    with pytest.raises(
        UserError, match=r"^teachers\.g: .*/teachers/g was made from other code than user:.*another out$"
    ):
        case(out, {"g": spec})


def test_a_finished_teacher_of_other_settings_is_refused(case, tmp_path):
    case(tmp_path, {"conv": CONV})
    before = digests(tmp_path)
    others = [
        ({"conv": CONV.model_copy(update={"lr": 0.2})}, OPTIONS),
        ({"conv": CONV}, OPTIONS.model_copy(update={"batch": 16})),
        ({"conv": CONV.model_copy(update={"weights": str(DEMO / "train" / "dataset.json")})}, OPTIONS),
    ]
    for teachers, options in others:
        with pytest.raises(UserError, match=r"^teachers\.conv: .*/teachers/conv was made from other weights"):
            case(tmp_path, teachers, options)
        assert digests(tmp_path) == before
    # Another machine or cache is no other teacher.
    resources = TrainResources(threads=2, workers=2, gpus=0)
    options = OPTIONS.model_copy(update={"cache": str(tmp_path / "cache")})
    squeeze_teachers(str(tmp_path), {"conv": CONV}, case.data, case.train, case.val, options, resources, 7, serial=True)
    assert digests(tmp_path) == before


def test_too_much_padding_stops_before_any_work(case, tmp_path):
    with pytest.raises(UserError, match=r"squeeze\.crop_padding: 28"):
        case(tmp_path, {"conv": CONV}, OPTIONS.model_copy(update={"crop_padding": 28}))
    assert not (tmp_path / "teachers").exists()


def test_serial_squeeze_keeps_to_its_threads(case, tmp_path, monkeypatch):
    torch.set_num_threads(2)
    seen = []
    original = stage.train_teacher
    monkeypatch.setattr(stage, "train_teacher", lambda *a: seen.append(torch.get_num_threads()) or original(*a))
    case(tmp_path, {"conv": CONV})
    assert (seen, torch.get_num_threads()) == ([1], 2)


def test_pretrained_weights_are_adopted(case, given, tmp_path, monkeypatch):
    """What the library says of them ends in the card."""
    from stages.teachers import teacher as module

    network = load_teacher(
        "t", CONV.model_copy(update={"weights": str(given / "teachers" / "conv" / "model.safetensors")}), case.data
    ).network
    published = Pretrained(network, 10, [0.15], [0.3], 32)
    monkeypatch.setattr(module, "load_pretrained", lambda spec, channels, field: published)
    case(tmp_path, {"p": TeacherSpec(arch=CONV.arch, kwargs=CONV.kwargs, weights="pretrained")})
    found = card(tmp_path, "p")
    assert (found.mean, found.std, found.input_size, found.origin) == ([0.15], [0.3], 32, "pretrained")
    assert (found.val_images, found.origin_sha256) == (200, None)
    case(tmp_path, {"p": TeacherSpec(arch=CONV.arch, kwargs=CONV.kwargs, weights="pretrained")})


def test_divergence_keeps_what_is_finished(case, tmp_path):
    """The others are trained, whichever comes first."""
    bad = RES.model_copy(update={"lr": 1e30})
    with pytest.raises(RunError, match=r"teachers\.res"):
        case(tmp_path, {"res": bad, "conv": CONV})
    assert set(digests(tmp_path)) == {"conv/card.json", "conv/model.safetensors"}


DRIVER = """
import json, sys
from cluster.resources import TrainResources
from cluster.resources import SessionOptions
from cluster.session import ray_session
from stages.data import DataSpec
from stages.squeeze.options import SqueezeOptions
from stages.squeeze.stage import squeeze_teachers
from stages.teachers.options import TeacherSpec

a = json.loads(sys.argv[1])
with ray_session(SessionOptions(num_cpus=2, object_store_mb=150)):
    squeeze_teachers(a["out"], {n: TeacherSpec(**s) for n, s in a["teachers"].items()}, DataSpec(**a["data"]),
                     a["train"], a["val"], SqueezeOptions(**a["options"]), TrainResources(threads=1, gpus=0), 7)
"""


@pytest.mark.ray
def test_ray_train_gives_the_serial_bytes(case, tmp_path, ray_local):
    teachers = {"conv": CONV, "res": RES}
    case(tmp_path / "serial", teachers)
    case(tmp_path / "ray", teachers, serial=False)
    assert digests(tmp_path / "ray") == digests(tmp_path / "serial")
    # Two data-parallel workers: other bits, but a working teacher.
    resources = TrainResources(workers=2, threads=1, gpus=0)
    squeeze_teachers(str(tmp_path / "two"), {"res": RES}, case.data, case.train, case.val, OPTIONS, resources, 7)
    assert card(tmp_path / "two", "res").val_top1 > 0.2


@pytest.mark.ray
@pytest.mark.slow
def test_errors_keep_their_words_through_ray_train(case, tmp_path, ray_local):
    with pytest.raises(RunError, match=r"teachers\.bad.*lr"):
        case(tmp_path, {"conv": CONV, "bad": RES.model_copy(update={"lr": 1e30})}, serial=False)
    with pytest.raises(UserError, match=r"teachers\.none.*no such"):
        case(tmp_path, {"none": RES.model_copy(update={"weights": "none.pt"})}, serial=False)


@pytest.mark.ray
@pytest.mark.slow
def test_sigkill_of_the_driver_and_resume(case, tmp_path):
    """The second driver goes on from the state that was kept, with the same result."""
    slow = RES.model_copy(update={"epochs": 40})
    options = OPTIONS.model_copy(update={"epochs": 40})
    case(tmp_path / "serial", {"res": slow}, options)
    arguments = {
        "out": str(tmp_path / "ray"), "teachers": {"res": slow.model_dump()}, "data": dataclasses.asdict(case.data),
        "train": case.train, "val": case.val, "options": options.model_dump(),
    }  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", DRIVER, json.dumps(arguments)]
    driver = subprocess.Popen(command, cwd=root, start_new_session=True)
    progress = str(tmp_path / "ray" / "progress" / "squeeze")
    deadline = time.monotonic() + 200
    while not any(record["done"] >= 3 for record in read_progress(progress).values()):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    done = max(record["done"] for record in read_progress(progress).values())
    assert done < 40
    seen = []
    driver = subprocess.Popen(command, cwd=root)
    while driver.poll() is None:
        seen += [record["done"] for record in read_progress(progress).values()]
        time.sleep(0.05)
    assert driver.returncode == 0
    assert min(seen) >= 2
    assert digests(tmp_path / "ray") == digests(tmp_path / "serial")
