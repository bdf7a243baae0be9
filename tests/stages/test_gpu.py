"""On a GPU: the same work leaves the same bytes, and about what it leaves on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.worker import Worker
from stages.data import DataSpec
from stages.device import reproducible
from stages.evaluate.core import StudentTraining, new_student, train_student
from stages.evaluate.options import Protocol
from stages.imageset import ImageSet
from stages.recover.core import recover_unit
from stages.recover.options import RecoverOptions
from stages.recover.unit import RecoverUnit
from stages.relabel.options import RelabelOptions
from stages.relabel.store import EpochLabels
from stages.relabel.views import draw_views
from stages.squeeze.core import TeacherTraining
from stages.squeeze.options import SqueezeOptions
from stages.teachers.options import NetworkSpec, TeacherSpec
from stages.teachers.teacher import Teacher, fresh_teacher

pytestmark = pytest.mark.gpu

COUNT = 40
DATA = DataSpec(32, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), tuple("abcdefghij"))
FAMILIES = ["resnet10", "vgg_bn", "convnet_d3", "wrn16_2", "shufflenetv2", "mobilenetv2"]


def teacher(family: str) -> Teacher:
    return fresh_teacher(family, TeacherSpec(arch=f"builtin:{family}"), DATA, 3)


def pixels() -> Tensor:
    return torch.randint(0, 256, (COUNT, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Batches:
    """The same images, batch after batch, as ``RealImages`` gives them."""

    def num_batches(self, batch: int, seed: int, epoch: int) -> int:
        return 6

    def batches(self, batch: int, seed: int, epoch: int) -> Any:
        for k in range(6):
            yield pixels().roll(k, 0), (torch.arange(COUNT) % 10).roll(k, 0)


def squeezed(family: str) -> dict[str, Tensor]:
    options = SqueezeOptions(epochs=1, batch=COUNT)
    training = TeacherTraining(teacher(family), options, 1, 0.05, 1, Worker("cuda"))
    with reproducible():
        training.train_epoch(Batches())  # type: ignore[arg-type]
    return {name: value.cpu() for name, value in training.network.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_is_trained_to_the_same_bytes(family: str) -> None:
    one, two = squeezed(family), squeezed(family)
    assert all(torch.equal(one[name], two[name]) for name in one)


def student(family: str) -> dict[str, Tensor]:
    images = ImageSet(pixels(), torch.arange(COUNT) % 10)
    network = new_student("s", NetworkSpec(arch=f"builtin:{family}"), DATA, 0)
    training = StudentTraining(network, images, Protocol(batch=10, lr=0.001), DATA, 2, 7, Worker("cuda"))

    def labels(epoch: int) -> EpochLabels:
        logits = np.random.default_rng(epoch).normal(0, 4, (COUNT, 10)).astype(np.float16)
        return EpochLabels(draw_views(5, epoch, COUNT, 32, RelabelOptions()), logits)

    with reproducible():
        for _ in train_student(training, labels):
            pass
    return {name: value.cpu() for name, value in training.weights().items()}


@pytest.mark.parametrize("family", ["resnet18", *FAMILIES])
def test_a_student_is_trained_to_the_same_bytes(family: str) -> None:
    one, two = student(family), student(family)
    assert all(torch.equal(one[name], two[name]) for name in one)


def recovered(device: str, iterations: int) -> tuple[Tensor, float]:
    teachers = {name: teacher(name).to(torch.device(device)) for name in FAMILIES}
    unit = RecoverUnit(
        ipc=0,
        chunk=0,
        classes=list(range(10)),
        logit_teachers=["resnet10"],
        bn_teachers=FAMILIES,
        iterations=iterations,
        seed=11,
    )
    found = recover_unit(unit, DATA.normalise(pixels()[:10]), teachers, RecoverOptions(), DATA, device)
    return found.pixels, found.loss_ce + sum(found.loss_bn.values())


def test_recovery_leaves_the_same_bytes_and_starts_as_on_a_cpu() -> None:
    one, two = recovered("cuda", 20), recovered("cuda", 20)
    assert torch.equal(one[0], two[0])
    assert one[1] == two[1]
    # One step: later ones are apart by what rounding makes of them.
    assert recovered("cuda", 1)[1] == pytest.approx(recovered("cpu", 1)[1], rel=1e-5)
