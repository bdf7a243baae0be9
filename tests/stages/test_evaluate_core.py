"""Training one student: what it sees, steps, averages, repeats and resumes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cluster.errors import RunError, UserError
from cluster.worker import Worker
from stages.data import DataSpec
from stages.evaluate.core import StudentTraining, batch_slices, new_student, train_student
from stages.evaluate.options import Protocol
from stages.evaluate.schedules import lr_multiplier
from stages.imageset import ImageSet
from stages.relabel.options import RelabelOptions
from stages.relabel.store import EpochLabels
from stages.relabel.views import draw_views, render_views
from stages.teachers.options import NetworkSpec
from stages.training import parameter_groups

SIZE, CLASSES, COUNT = 12, 4, 30
DATA = DataSpec(SIZE, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), tuple("abcd"))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 3, SIZE, SIZE), dtype=np.uint8)
    return ImageSet(torch.from_numpy(pixels), torch.arange(COUNT) % CLASSES)


def labels_of_epoch(epoch: int) -> EpochLabels:
    views = draw_views(5, epoch, COUNT, SIZE, RelabelOptions())
    logits = np.random.default_rng(epoch).normal(0, 4, (COUNT, CLASSES)).astype(np.float16)
    return EpochLabels(views, logits)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *head)


def training(images: ImageSet, net: nn.Module | None = None, epochs: int = 4, **options: Any) -> StudentTraining:
    protocol = Protocol.model_validate({"batch": 8, "lr": 0.01, **options})
    return StudentTraining(net or network(), images, protocol, DATA, epochs, 7, Worker())


def finish(student: StudentTraining) -> dict[str, Tensor]:
    for _ in train_student(student, labels_of_epoch):
        pass
    return student.weights()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("batch", [7, 50, 128])
def test_student_sees_what_the_teachers_labelled(images: ImageSet, batch: int) -> None:
    student, seen = training(images, batch=batch), []
    student.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    epoch = labels_of_epoch(0)
    student.train_epoch(epoch)
    expected = render_views(images.images, epoch.views, epoch.views.order, DATA)
    assert torch.equal(torch.cat(seen), expected[: len(torch.cat(seen))])
    assert sum(map(len, seen)) == COUNT


def test_epoch_loss_is_the_mean_over_views(images: ImageSet) -> None:
    """One step of a linear model, recomputed in float64 from the rendered views."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES))
    weight, bias = (p.detach().double().numpy().copy() for p in flat[1].parameters())
    epoch = labels_of_epoch(2)
    loss = training(images, flat, batch=COUNT, loss="mse_ce", ce_weight=0.3).train_epoch(epoch)
    ids = epoch.views.order
    x = render_views(images.images, epoch.views, ids, DATA).double().numpy().reshape(COUNT, -1)
    out = x @ weight.T + bias
    mse = ((out - epoch.logits.astype(np.float64)) ** 2).mean()
    log_p = out - np.log(np.exp(out).sum(1, keepdims=True))
    ce = -log_p[np.arange(COUNT), images.labels.numpy()[ids]].mean()
    assert loss == pytest.approx(mse + 0.3 * ce, rel=1e-5)


def test_first_sgd_step_by_hand(images: ImageSet) -> None:
    """Hard labels of both partners, weight decay on the weight matrix alone."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES))
    weight, bias = (p.detach().double().numpy().copy() for p in flat[1].parameters())
    epoch = labels_of_epoch(0)
    student = training(images, flat, batch=COUNT, loss="ce", optimizer="sgd", lr=0.1, weight_decay=0.2)
    student.train_epoch(epoch)
    ids, partner = epoch.views.order, epoch.views.partner
    x = render_views(images.images, epoch.views, ids, DATA).double().numpy().reshape(COUNT, -1)
    p = np.exp(x @ weight.T + bias)
    p /= p.sum(1, keepdims=True)
    lam = epoch.views.lam[ids].astype(np.float64)[:, None]
    hot = np.eye(CLASSES)[images.labels.numpy()]
    g = (p - lam * hot[ids] - (1 - lam) * hot[partner[ids]]) / COUNT
    after = student.weights()
    assert after["1.weight"].numpy() == pytest.approx(weight - 0.1 * (g.T @ x + 0.2 * weight), abs=1e-6)
    assert after["1.bias"].numpy() == pytest.approx(bias - 0.1 * g.sum(0), abs=1e-6)


def test_decay_groups_leave_out_biases_and_norms() -> None:
    net = network()
    groups = parameter_groups(net, 0.01)
    decayed = {id(p) for g in groups if g["weight_decay"] == 0.01 for p in g["params"]}
    assert decayed == {id(net[0].weight), id(net[6].weight)}
    assert sum(len(g["params"]) for g in groups) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("count", "batch", "world", "sizes"),
    [
        (30, 8, 1, [8, 8, 8, 6]),
        (25, 8, 1, [8, 8, 8]),
        (5, 50, 1, [5]),
        (30, 9, 2, [9, 9, 9]),
        (32, 14, 2, [14, 14, 4]),
    ],
)
def test_only_single_leftovers_are_dropped(count: int, batch: int, world: int, sizes: list[int]) -> None:
    slices = batch_slices(count, batch, world)
    assert [s.stop - s.start for s in slices] == sizes
    assert [s.start for s in slices] == [batch * i for i in range(len(sizes))]


def test_learning_rate_falls_with_every_step(images: ImageSet) -> None:
    student, seen = training(images, epochs=2, schedule="cosine"), []
    student.optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    finish(student)
    assert seen == pytest.approx([0.01 * lr_multiplier(student.protocol, i / 8) for i in range(8)])


def test_ema_averages_parameters_and_keeps_current_statistics(images: ImageSet) -> None:
    options = {"batch": COUNT, "optimizer": "sgd"}
    plain, averaged = training(images, **options), training(images, ema=0.9, **options)
    expected = {name: p.detach().double().numpy().copy() for name, p in plain.network.named_parameters()}
    for _ in train_student(plain, labels_of_epoch):
        for name, p in plain.network.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach().double().numpy()
    found = finish(averaged)
    for name, value in expected.items():
        assert found[name].numpy() == pytest.approx(value, abs=1e-6)
    assert torch.equal(found["1.running_var"], plain.network.state_dict()["1.running_var"])
    assert not torch.equal(found["0.weight"], plain.weights()["0.weight"])


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "loss": "kl"}, {"ema": 0.8, "batch": 7}])
def test_same_seed_same_weights_and_resume_is_exact(images: ImageSet, options: dict[str, Any]) -> None:
    whole = finish(training(images, **options))
    torch.manual_seed(99)  # dropout must not look at the global generator
    assert equal(finish(training(images, **options)), whole)

    first = training(images, **options)
    for _ in train_student(first, labels_of_epoch):
        if first.epoch == 2:
            break
    buffer = io.BytesIO()
    torch.save(first.state(), buffer)
    buffer.seek(0)
    second = training(images, **options)
    second.restore(torch.load(buffer, weights_only=True))
    assert equal(finish(second), whole)
    assert second.losses == [*first.losses, *second.losses[2:]]
    assert len(second.losses) == 4


def test_training_leaves_the_global_generator_alone(images: ImageSet) -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    finish(training(images, epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_students_learn(images: ImageSet) -> None:
    student = training(images, epochs=30, loss="ce", ema=None)
    finish(student)
    assert np.mean(student.losses[-5:]) < student.losses[0]


def test_diverged_loss_is_an_error(images: ImageSet) -> None:
    with pytest.raises(RunError, match=r"epoch \d+; lower evaluate\.protocol\.lr"):
        finish(training(images, optimizer="sgd", lr=1e12, epochs=8))


def test_labels_of_other_images_are_refused(images: ImageSet) -> None:
    fewer = ImageSet(images.images[:10], images.labels[:10])
    with pytest.raises(RunError, match="10 images but labels of 30"):
        training(fewer).train_epoch(labels_of_epoch(0))


def test_batch_too_small_for_the_workers_names_the_field(images: ImageSet) -> None:
    with pytest.raises(UserError, match=r"evaluate\.protocol\.batch"):
        StudentTraining(network(), images, Protocol(batch=3), DATA, 1, 0, Worker(world=2))


def test_initial_weights_belong_to_name_and_seed() -> None:
    spec = NetworkSpec(arch="builtin:convnet_d3")
    torch.manual_seed(0)
    first = new_student("a", spec, DATA, 0).state_dict()
    torch.manual_seed(1)
    assert equal(new_student("a", spec, DATA, 0).state_dict(), first)
    assert not equal(new_student("a", spec, DATA, 1).state_dict(), first)
    assert not equal(new_student("b", spec, DATA, 0).state_dict(), first)
