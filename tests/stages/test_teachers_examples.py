"""The documented teachers of ``examples/networks.py``: real foreign weights, their key maps, their accuracy."""

from __future__ import annotations

import ast
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from stages.data import DataSpec
from stages.images import to_pixels
from stages.recover.objective import LocalObjective
from stages.recover.options import RecoverOptions
from stages.teachers.accuracy import Accuracy, top1_of
from stages.teachers.options import TeacherSpec
from stages.teachers.teacher import load_teacher

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = ROOT / "examples" / "networks.py"
FOLDERS = {
    "resnet20": "cifar10_resnet_akamaster",
    "mcunet": "imagenet_mcunet_in3",
    "mobilenet": "imagenet_mobilenetv1_x0.25",
}
IMAGENETTE = {
    "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497, "n03394916": 566,
    "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def documented(name: str, shared: Path) -> dict[str, Any]:
    """A teacher as the module's documentation writes it."""
    text = ast.get_docstring(ast.parse(NETWORKS.read_text()))
    assert text
    blocks = [part.split("\n\n")[0] for part in text.split("::\n\n")[1:]]
    found = {k: v for block in blocks for k, v in yaml.safe_load(block)["teachers"].items()}[name]
    found["arch"] = found["arch"].replace("examples/networks.py", str(NETWORKS))
    found["weights"] = str(shared / "checkpoints" / FOLDERS[name] / found["weights"])
    return found


def cifar(shared: Path, per_class: int | None) -> tuple[DataSpec, list[tuple[Tensor, Tensor]]]:
    """CIFAR-10 (JPEG copy), test images."""
    found: dict[str, list[np.ndarray]] = {}
    with tarfile.open(shared / "cifar10" / "cifar10_jpeg.tar.xz") as tar:
        for member in tar:
            *_, split, name, file = f"//{member.name}".split("/")
            if split == "test" and file.endswith(".jpg"):
                content = tar.extractfile(member)
                assert content
                if per_class is None or len(found.get(name, [])) < per_class:
                    found.setdefault(name, []).append(to_pixels(content.read(), 32, 3))
    return as_parts(32, found)


def imagenette(shared: Path, per_class: int | None) -> tuple[DataSpec, list[tuple[Tensor, Tensor]]]:
    """Imagenette, validation images at 224 px."""
    found: dict[str, list[np.ndarray]] = {}
    with tarfile.open(shared / "imagenette224" / "imagenette224_sub.tar") as tar:
        for member in sorted(tar, key=lambda m: m.name):
            *_, split, name, _ = f"//{member.name}".split("/")
            if split == "val" and member.isfile() and name.startswith("n"):
                content = tar.extractfile(member)
                assert content
                if per_class is None or len(found.get(name, [])) < per_class:
                    found.setdefault(name, []).append(to_pixels(content.read(), 224, 3))
    return as_parts(224, found)


def as_parts(size: int, found: dict[str, list[np.ndarray]]) -> tuple[DataSpec, list[tuple[Tensor, Tensor]]]:
    names = sorted(found)
    data = DataSpec(size, 3, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26), tuple(names))
    parts = [
        (torch.from_numpy(np.stack(found[name])), torch.full((len(found[name]),), label))
        for label, name in enumerate(names)
    ]
    return data, parts


def accuracy(name: str, shared: Path, parts: Any, data: DataSpec, **change: Any) -> Accuracy:
    spec = documented(name, shared)
    if "class_index" in spec:
        spec["class_index"] = IMAGENETTE
    teacher = load_teacher(name, TeacherSpec(**{**spec, **change}), data)
    return top1_of(teacher, parts)


@pytest.fixture(scope="module")
def few_imagenette(shared_data):
    return imagenette(shared_data, 20)


@pytest.mark.parametrize(("name", "bn"), [("mcunet", 54), ("mobilenet", 27)])
def test_imagenet_teachers_load_as_documented(shared_data, few_imagenette, name, bn):
    """BN layers as published; and, on a fifth of the images, about the accuracy of the whole set."""
    data, parts = few_imagenette
    spec = TeacherSpec(**{**documented(name, shared_data), "class_index": IMAGENETTE})
    teacher = load_teacher(name, spec, data)
    assert len(teacher.bn_layers) == bn
    assert teacher.prepare(torch.zeros(1, 3, 224, 224)).shape[-1] == {"mcunet": 176, "mobilenet": 224}[name]
    found = top1_of(teacher, parts)
    expected = {"mcunet": 0.624, "mobilenet": 0.372}[name]
    # Two standard errors of 200 images.
    assert found.top1_all == pytest.approx(expected, abs=0.07)
    assert found.top1 > found.top1_all + 0.15


def test_cifar_resnet_loads_as_documented(shared_data, few_cifar):
    data, parts = few_cifar
    found = accuracy("resnet20", shared_data, parts, data)
    assert found.top1 == found.top1_all == pytest.approx(0.81, abs=0.05)


@pytest.fixture(scope="module")
def few_cifar(shared_data):
    return cifar(shared_data, 40)


@pytest.fixture(scope="module")
def all_imagenette(shared_data):
    return imagenette(shared_data, None)


@pytest.mark.slow
def test_accuracy_of_mobilenet(shared_data, all_imagenette):
    """The whole set: the figure of the data's README."""
    data, parts = all_imagenette
    found = accuracy("mobilenet", shared_data, parts, data)
    assert found.images == 1000
    assert found.top1_all == pytest.approx(0.372, abs=0.002)


@pytest.mark.slow
@pytest.mark.xfail(
    strict=True,
    reason="59.4 % antialiased over 201 px as documented, against 62.4 % stated; the way to 176 px decides (nearest "
    "neighbours 62.0, straight to 176 px 57.8 to 61.9), and which way that figure was measured is not known",
)
def test_accuracy_of_mcunet(shared_data, all_imagenette):
    data, parts = all_imagenette
    assert accuracy("mcunet", shared_data, parts, data).top1_all == pytest.approx(0.624, abs=0.005)


@pytest.mark.slow
def test_accuracies_of_the_cifar_resnets(shared_data):
    data, parts = cifar(shared_data, None)
    for depth, file, expected in ((20, "resnet20-12fca82f.th", 0.810), (56, "resnet56-4bfd9763.th", 0.832)):
        weights = str(shared_data / "checkpoints" / FOLDERS["resnet20"] / file)
        found = accuracy("resnet20", shared_data, parts, data, kwargs={"depth": depth}, weights=weights)
        assert found.images == 10_000
        assert found.top1 == pytest.approx(expected, abs=0.002)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("resnet20", 0.97), ("mobilenet", 0.84), ("mcunet", 0.82)])
def test_how_far_bfloat16_turns_the_gradient(shared_data, few_cifar, few_imagenette, name, least):
    """Of 20 real images. With ReLU some activations lie on another side of the kink, see docs/results.md."""
    data, parts = few_cifar if name == "resnet20" else few_imagenette
    spec = documented(name, shared_data) | ({} if name == "resnet20" else {"class_index": IMAGENETTE})
    teacher = load_teacher(name, TeacherSpec(**spec), data)
    x = data.normalise(torch.cat([pixels[:2] for pixels, _ in parts]))
    y = torch.cat([labels[:2] for _, labels in parts])
    found = []
    for precision in ("fp32", "bf16"):
        objective = LocalObjective({name: teacher}, RecoverOptions(r_bn=0.01, precision=precision))
        objective.prepare([name], [name], x[:1])
        found.append(objective.step(x, y, [name], [name]).gradient)
    cosine = torch.nn.functional.cosine_similarity(*(gradient.flatten() for gradient in found), 0).item()
    assert least <= cosine < 0.9999
    print(f"{name}: {cosine:.4f}")
