"""The adapter between the run's data and a network: classes, normalisation, size, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch import nn

from cluster import storage
from cluster.errors import UserError
from stages.data import DataSpec
from stages.teachers.build import build_network
from stages.teachers.card import CARD_FILE, WEIGHTS_FILE, TeacherCard, card_beside, read_card, write_card
from stages.teachers.options import NetworkSpec, TeacherSpec
from stages.teachers.teacher import Teacher, fresh_teacher, load_teacher
from stages.teachers.weights import save_weights

DATA = DataSpec(32, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), ("ant", "bee", "cat"))
ARCH = {"arch": "builtin:convnet_d3", "kwargs": {"width": 8}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def weights(tmp_path):
    """Saves a network of so many outputs; returns (path, network)."""

    def make(num_outputs: int = 3) -> tuple[str, nn.Module]:
        network = build_network(NetworkSpec(**ARCH), num_outputs, 3, seed=4)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.uniform_(-0.5, 0.5)
                layer.running_var.uniform_(0.5, 1.5)
        path = str(tmp_path / f"w{num_outputs}.safetensors")
        save_weights(path, network.state_dict())
        # In the layout of a teacher, which decides on the last bits.
        return path, network.eval().to(memory_format=torch.channels_last)

    return make


def images(count=5, size=32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


class Echo(nn.Module):
    """Returns what it gets, as logits."""

    def forward(self, x):
        return x.flatten(1)


def echo(data=DATA, size=32, **kwargs) -> Teacher:
    return Teacher("t", Echo(), data, num_outputs=3 * size * size, **kwargs)


def test_frozen_for_good(weights):
    path, _ = weights()
    teacher = load_teacher("t", TeacherSpec(**ARCH, weights=path), DATA)
    assert not any(p.requires_grad for p in teacher.parameters())
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    nn.Sequential(teacher).train()
    assert not any(m.training for m in teacher.modules())
    x = torch.randn(4, 3, 32, 32, requires_grad=True)
    teacher(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(torch.equal(before[k], v) for k, v in teacher.network.state_dict().items())


def test_same_space_is_the_identity_without_a_copy(weights):
    path, network = weights()
    teacher = load_teacher("t", TeacherSpec(**ARCH, weights=path), DATA)
    x = DATA.normalise(images())
    assert teacher.prepare(x) is x
    assert torch.equal(teacher(x), network(x))
    assert [layer.num_features for layer in teacher.bn_layers] == [8, 8, 8]


def test_own_normalisation():
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    pixels = images()
    want = (pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    got = echo(mean=mean, std=std).prepare(DATA.normalise(pixels))
    assert torch.allclose(got.double(), want, atol=2e-6)


@pytest.mark.parametrize(("size", "input_size", "resize"), [(32, 48, 48), (32, 20, 20), (40, 28, 32), (33, 17, 40)])
def test_own_size(size, input_size, resize):
    """Against torchvision: resize (antialiased), then the centre."""
    data = DataSpec(size, 3, (0.0,) * 3, (1.0,) * 3, DATA.class_names)
    x = torch.rand(2, 3, size, size)
    teacher = echo(data, input_size, input_size=input_size, resize=resize)
    want = TF.resize(x, [resize, resize], antialias=True)
    top = (resize - input_size) // 2
    want = want[:, :, top : top + input_size, top : top + input_size]
    assert torch.allclose(teacher.prepare(x), want, atol=1e-5)


def test_gradient_passes_size_and_normalisation():
    data = DataSpec(8, 3, DATA.mean, DATA.std, DATA.class_names)
    teacher = echo(data, 6, input_size=6, resize=7, mean=[0.1] * 3, std=[0.5] * 3).double()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(teacher.prepare, x)


def test_classes_are_picked_and_put_in_order(weights):
    path, network = weights(5)
    spec = TeacherSpec(**ARCH, weights=path, num_outputs=5, class_index={"bee": 0, "cat": 4, "ant": 2, "dog": 1})
    teacher = load_teacher("t", spec, DATA)
    x = DATA.normalise(images())
    assert torch.equal(teacher.forward_full(x), network(x))
    assert torch.equal(teacher(x), network(x)[:, [2, 0, 4]])


@pytest.mark.parametrize(
    ("outputs", "extra", "words"),
    [
        (5, {"num_outputs": 5}, ["5 classes", "3", "class_index"]),
        (5, {}, ["of another shape", "head.weight"]),
        (5, {"class_index": {"ant": 0, "bee": 1, "cat": 2}}, ["num_outputs"]),
        (5, {"num_outputs": 5, "class_index": {"ant": 0, "cat": 2}}, ["class_index", "bee"]),
        (5, {"num_outputs": 5, "class_index": {"ant": 0, "bee": 5, "cat": 2}}, ["bee → 5", "0 … 4"]),
        (5, {"num_outputs": 5, "class_index": {"ant": 0, "bee": 0, "cat": 2}}, ["share an output"]),
        (3, {"class_names": ["bee", "ant", "cat"]}, ["class order", "class 0", "'bee'", "'ant'", "class_index"]),
        (3, {"class_names": ["ant", "bee", "dog"]}, ["class names", "class 2", "'dog'", "'cat'"]),
        (3, {"num_outputs": 3, "class_names": ["ant", "bee"]}, ["2 names for 3 outputs"]),
        (3, {"mean": [0.5]}, ["teachers.t.mean", "1 values", "3 channels"]),
        (3, {"input_size": 40, "resize": 32}, ["teachers.t.resize", "32", "40"]),
        (3, {"arch": "torchvision:inception_v3", "kwargs": {},
             "key_map": {"ignore_missing": ["."], "ignore_unexpected": ["."]}},
         ["does not take 3 × 32 × 32", "input_size"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(weights, outputs, extra, words):
    path, _ = weights(outputs)
    with pytest.raises(UserError) as error:
        load_teacher("t", TeacherSpec(**{**ARCH, "weights": path, **extra}), DATA)
    message = str(error.value)
    assert all(word in message for word in ["teachers.t", *words]), message
    assert "\n" not in message


def test_damaged_weights_are_noticed(tmp_path, weights):
    _, network = weights()
    state = network.state_dict()
    state["head.bias"] = torch.full((3,), torch.nan)
    save_weights(str(tmp_path / "nan.safetensors"), state)
    with pytest.raises(UserError, match=r"teachers\.t.*not finite"):
        load_teacher("t", TeacherSpec(**ARCH, weights=str(tmp_path / "nan.safetensors")), DATA)


def test_no_weights_yet():
    with pytest.raises(UserError, match=r"teachers\.t\.weights.*squeeze"):
        load_teacher("t", TeacherSpec(**ARCH), DATA)


def test_fresh_teacher_may_be_trained():
    teacher = fresh_teacher("t", TeacherSpec(**ARCH), DATA, 3)
    teacher.network.train().requires_grad_(True)
    assert teacher.network.training
    assert teacher.class_names == list(DATA.class_names)


CARD = TeacherCard(
    arch="builtin:convnet_d3", kwargs={"width": 8}, num_outputs=3, class_names=["ant", "bee", "cat"], class_index=None,
    input_size=24, resize=26, mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.5], bn_channels=[8, 8, 8], parameters=1000,
    train_top1=0.9, val_top1=0.8, val_top1_all=0.8, train_images=100, val_images=50, sha256="0" * 64, origin="squeeze",
)  # fmt: skip


def test_card(tmp_path):
    write_card(str(tmp_path), CARD)
    assert read_card(str(tmp_path)) == CARD
    assert json.loads((tmp_path / CARD_FILE).read_text())["bn_layers"] == 3
    assert read_card(str(tmp_path / "none")) is None
    assert card_beside(str(tmp_path / "other.safetensors")) is None
    assert card_beside(str(tmp_path / WEIGHTS_FILE)) == CARD
    (tmp_path / CARD_FILE).write_text('{"arch": 5}')
    with pytest.raises(UserError, match=r"card\.json"):
        read_card(str(tmp_path))


def test_card_beside_the_weights_speaks_for_them(tmp_path, weights):
    """Normalisation, size and class order of a teacher that another run trained."""
    _, network = weights()
    save_weights(str(tmp_path / WEIGHTS_FILE), network.state_dict())
    write_card(str(tmp_path), CARD)
    spec = TeacherSpec(**ARCH, weights=str(tmp_path / WEIGHTS_FILE))
    teacher = load_teacher("t", spec, DATA)
    assert (teacher.mean, teacher.input_size, teacher.resize) == (CARD.mean, 24, 26)
    assert teacher.prepare(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 24, 24)
    # What the configuration says goes first.
    assert load_teacher("t", spec.model_copy(update={"mean": [0.2] * 3}), DATA).mean == [0.2] * 3
    write_card(str(tmp_path), CARD.model_copy(update={"class_names": ["cat", "bee", "ant"]}))
    with pytest.raises(UserError, match="class order"):
        load_teacher("t", spec, DATA)
    reordered = spec.model_copy(update={"class_index": {"cat": 0, "bee": 1, "ant": 2}})
    x = torch.randn(2, 3, 32, 32)
    teacher = load_teacher("t", reordered, DATA)
    assert np.array_equal(teacher(x).numpy(), teacher.forward_full(x).numpy()[:, ::-1])


@pytest.mark.s3
def test_actors_of_a_node_fetch_weights_once(weights, s3_server, tmp_path, caplog, monkeypatch):
    """Of a teacher's folder with a card, whose digest is checked."""
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path / "cache"))
    path, network = weights()
    folder = f"{s3_server}/{tmp_path.name}"
    content = storage.read_bytes(path)
    storage.write_bytes(f"{folder}/{WEIGHTS_FILE}", content)
    same = {"input_size": 32, "resize": 32, "mean": list(DATA.mean), "std": list(DATA.std)}
    found = CARD.model_copy(update={**same, "sha256": hashlib.sha256(content).hexdigest()})
    write_card(folder, found)
    spec = TeacherSpec(**ARCH, weights=f"{folder}/{WEIGHTS_FILE}")
    x = DATA.normalise(images())
    with caplog.at_level(logging.INFO, "werkzeug"), ThreadPoolExecutor(8) as actors:
        teachers = list(actors.map(lambda _: load_teacher("t", spec, DATA), range(8)))
    gets = [r.getMessage() for r in caplog.records if "GET" in r.getMessage() and WEIGHTS_FILE in r.getMessage()]
    assert len(gets) == 1, gets
    with torch.no_grad():
        assert all(torch.equal(teacher(x), network(x)) for teacher in teachers)
    # Another file than the card speaks of is not taken.
    write_card(folder, found.model_copy(update={"sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"teachers\.t: .*model\.safetensors: damaged"):
        load_teacher("t", spec, DATA)
