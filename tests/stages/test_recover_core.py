"""The optimisation of a unit against a plain re-implementation, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import RunError
from stages.data import DataSpec
from stages.recover.augment import augment, draw_augmentation
from stages.recover.core import LOG_EVERY, initial_noise, learning_rate, recover_unit
from stages.recover.options import Crop, RecoverOptions
from stages.recover.unit import RecoverUnit

DATA = DataSpec(12, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), ("a", "b", "c", "d"))


class Tiny(nn.Module):
    """A stand-in for a teacher."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        bn1, bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), bn1, nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), bn2, nn.ReLU())
        self.head = nn.Linear(8, 4)
        self.bn_layers = [bn1, bn2]
        for bn in self.bn_layers:
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture
def teachers() -> dict[str, Any]:
    return {"a": Tiny(0), "b": Tiny(1), "c": Tiny(2)}


def unit(**change: Any) -> RecoverUnit:
    values = {
        "ipc": 3,
        "chunk": 0,
        "classes": [0, 2, 3],
        "logit_teachers": ["a"],
        "bn_teachers": ["a", "b"],
        "iterations": 7,
        "seed": 11,
    }
    return RecoverUnit(**{**values, **change})


def images() -> Tensor:
    return DATA.normalise(torch.randint(0, 256, (3, 3, 12, 12), generator=torch.Generator().manual_seed(0)).byte())


def plain_recovery(u: RecoverUnit, x0: Tensor, teachers: dict[str, Any], o: RecoverOptions) -> Tensor:
    """Float64: the loop of the paper with Adam, schedule and statistics written out."""
    low = (0 - torch.tensor(DATA.mean)) / torch.tensor(DATA.std)
    high = (1 - torch.tensor(DATA.mean)) / torch.tensor(DATA.std)
    x, m, v = x0.double(), torch.zeros(()).double(), torch.zeros(()).double()
    nets = {n: t.double() for n, t in teachers.items()}
    for t in range(u.iterations):
        x = x.detach().requires_grad_()
        z = augment(x, draw_augmentation(u.seed, t, len(x), 12, o))
        loss = F.cross_entropy(nets[u.logit_teachers[0]](z), torch.tensor(u.classes))
        for name in u.bn_teachers:
            h, first = z, True
            for layer in nets[name].body:
                if isinstance(layer, nn.BatchNorm2d):
                    mu = h.mean((0, 2, 3))
                    s = ((h - mu.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
                    r = ((layer.running_mean - mu) ** 2).sum().sqrt() + ((layer.running_var - s) ** 2).sum().sqrt()
                    loss = loss + o.r_bn / len(u.bn_teachers) * (o.first_bn_multiplier if first else 1) * r
                    first = False
                h = layer(h)
        (g,) = torch.autograd.grad(loss, x)
        m, v = o.betas[0] * m + (1 - o.betas[0]) * g, o.betas[1] * v + (1 - o.betas[1]) * g * g
        m_hat, v_hat = m / (1 - o.betas[0] ** (t + 1)), v / (1 - o.betas[1] ** (t + 1))
        lr = 0.5 * (1 + math.cos(math.pi * t / u.iterations)) * o.lr
        x = x.detach() - lr * m_hat / (v_hat.sqrt() + 1e-8)
        x = torch.minimum(torch.maximum(x, low.view(1, 3, 1, 1)), high.view(1, 3, 1, 1))
    mean, std = torch.tensor(DATA.mean).view(1, 3, 1, 1), torch.tensor(DATA.std).view(1, 3, 1, 1)
    return (x * std + mean) * 255


@pytest.mark.parametrize("batch_augment", ["batch", "image"])
def test_equals_plain_float64_recovery(teachers: dict[str, Any], batch_augment: str) -> None:
    options = RecoverOptions(lr=0.05, r_bn=0.1, roll=3, batch_augment=batch_augment)  # type: ignore[arg-type]
    got = recover_unit(unit(), images(), teachers, options, DATA, "cpu").pixels
    expected = plain_recovery(unit(), images(), {n: Tiny(i) for i, n in enumerate("abc")}, options)
    assert got.dtype == torch.uint8
    # float32 against float64: at most a rounding step of the 8-bit image, almost nowhere.
    gap = (got.double() - expected).abs()
    assert gap.max() <= 1.5
    assert gap.mean() < 0.3
    assert (got != DATA.denormalise(images())).float().mean() > 0.8


def test_cosine_schedule() -> None:
    assert learning_rate(0, 4000, 0.05) == 0.05
    assert learning_rate(2000, 4000, 0.05) == pytest.approx(0.025, rel=1e-12)
    assert learning_rate(1000, 4000, 0.05) == pytest.approx(0.05 * (2 + 2**0.5) / 4, rel=1e-12)
    last = learning_rate(3999, 4000, 0.05)
    assert last == pytest.approx(0.05 * math.pi**2 / 4 / 4000**2, rel=1e-3)


def test_noise_is_standard_normal_and_keyed_by_the_units_seed() -> None:
    big = unit(classes=list(range(4)) * 50)
    noise = initial_noise(big, DATA)
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert torch.equal(noise, initial_noise(big, DATA))
    assert not torch.equal(noise, initial_noise(unit(classes=big.classes, seed=12), DATA))


def test_noise_is_clamped_after_the_first_step_only(teachers: dict[str, Any]) -> None:
    """Teachers first see the noise as it was drawn; with the smallest of steps the result is the clamped noise."""
    seen: list[Tensor] = []
    teachers["a"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    options = RecoverOptions(lr=1e-9, crop=Crop(min_scale=1), flip=False, roll=0)
    got = recover_unit(unit(iterations=2), None, teachers, options, DATA, "cpu").pixels
    noise = initial_noise(unit(), DATA)
    low, high = DATA.valid_range(noise)
    assert ((noise < low) | (noise > high)).float().mean() > 0.02
    *_, first, second = seen
    assert torch.allclose(first, noise, atol=1e-6)
    assert torch.allclose(second, noise.clamp(low, high), atol=1e-6)
    expected = DATA.denormalise(noise)
    assert (got.int() - expected.int()).abs().max() <= 1
    assert got.min() == 0
    assert got.max() == 255


def test_record(teachers: dict[str, Any]) -> None:
    calls: list[tuple[int, int]] = []
    result = recover_unit(
        unit(iterations=LOG_EVERY + 3), images(), teachers, RecoverOptions(r_bn=0.5), DATA, "cpu",
        on_step=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    steps = LOG_EVERY + 3
    assert [entry["step"] for entry in result.log] == [0, LOG_EVERY, steps - 1]
    assert calls == [(t + 1, steps) for t in range(steps)]
    last = result.log[-1]
    assert list(last["bn"]) == list(result.loss_bn) == ["a", "b"]
    assert last["bn"] == result.loss_bn
    assert last["ce"] == result.loss_ce
    assert last["loss"] == pytest.approx(last["ce"] + 0.5 * sum(last["bn"].values()) / 2, rel=1e-5)
    assert result.log[-1]["loss"] < result.log[0]["loss"]
    assert result.iterations == steps


def test_round_robin_records_the_last_value_of_each(teachers: dict[str, Any]) -> None:
    pool = ["a", "b", "c"]
    options = RecoverOptions(selection="round_robin")
    result = recover_unit(unit(logit_teachers=pool, bn_teachers=pool), images(), teachers, options, DATA, "cpu")
    assert list(result.loss_bn) == pool
    assert list(result.log[0]["bn"]) == ["a"]
    assert list(result.log[-1]["bn"]) == ["a"]  # step 6 of 7, 6 mod 3
    short = recover_unit(
        unit(logit_teachers=pool, bn_teachers=pool, iterations=2), images(), teachers, options, DATA, "cpu"
    )
    assert list(short.loss_bn) == ["a", "b"]


def test_per_step_draws_matter(teachers: dict[str, Any]) -> None:
    u = unit(bn_teachers=["a", "b", "c"], iterations=20)
    fixed = recover_unit(u, images(), teachers, RecoverOptions(selection="fixed"), DATA, "cpu")
    drawn = recover_unit(u, images(), teachers, RecoverOptions(selection="per_step"), DATA, "cpu")
    assert not torch.equal(fixed.pixels, drawn.pixels)
    assert list(drawn.loss_bn) == ["a", "b", "c"]


def test_only_pixels_get_gradients_and_teachers_do_not_change(teachers: dict[str, Any]) -> None:
    for teacher in teachers.values():
        teacher.requires_grad_(True)  # even a careless teacher
    before = {n: {k: v.clone() for k, v in t.state_dict().items()} for n, t in teachers.items()}
    recover_unit(unit(), images(), teachers, RecoverOptions(), DATA, "cpu")
    assert all(p.grad is None for t in teachers.values() for p in t.parameters())
    for name, teacher in teachers.items():
        assert all(torch.equal(value, before[name][key]) for key, value in teacher.state_dict().items())


def test_does_not_touch_its_inputs_nor_global_random_state(teachers: dict[str, Any]) -> None:
    start = images()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = recover_unit(unit(), start, teachers, RecoverOptions(), DATA, "cpu")
    assert torch.equal(start, images())
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    torch.manual_seed(99)
    two = recover_unit(unit(), start, teachers, RecoverOptions(), DATA, "cpu")
    assert torch.equal(one.pixels, two.pixels)
    assert one.log == two.log


FLAGS = [
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cudnn, "deterministic"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_tf32"),
]


@pytest.fixture
def callers_flags() -> Iterator[list[bool]]:
    """All against what recovery wants."""
    before = [getattr(holder, name) for holder, name in FLAGS]
    values = [True, False, True, True]
    for (holder, name), value in zip(FLAGS, values, strict=True):
        setattr(holder, name, value)
    yield values
    for (holder, name), value in zip(FLAGS, before, strict=True):
        setattr(holder, name, value)


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_precision_is_as_asked_and_reproducible_while_it_lasts(
    teachers: dict[str, Any], callers_flags: list[bool], precision: str, tf32: bool
) -> None:
    """Whatever the caller's settings, which are theirs again afterwards, after an error too."""
    seen: list[list[bool]] = []

    def look(done: int, total: int) -> None:
        seen.append([getattr(holder, name) for holder, name in FLAGS])
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        recover_unit(unit(), images(), teachers, RecoverOptions(precision=precision), DATA, "cpu", on_step=look)
    assert seen == [[False, True, tf32, False]] * 2
    assert [getattr(holder, name) for holder, name in FLAGS] == callers_flags


@pytest.mark.parametrize(
    "bad",
    [{"betas": (0.5, 1.0)}, {"betas": (-0.1, 0.9)}, {"betas": (float("nan"), 0.9)}, {"lr": float("inf")},
     {"r_bn": float("nan")}, {"var_weight": float("inf")}],
)  # fmt: skip
def test_settings_that_no_optimiser_takes(bad: dict[str, Any]) -> None:
    (field,) = bad
    with pytest.raises(ValueError, match=field):
        RecoverOptions(**bad)


def test_nan_names_unit_seed_and_step(teachers: dict[str, Any]) -> None:
    bad = images()
    bad[1, 0, 3, 3] = float("nan")
    with pytest.raises(RunError, match=r"unit-00003-00000 \(seed 11\).* step 0 of 7.*lower recover\.lr"):
        recover_unit(unit(), bad, teachers, RecoverOptions(), DATA, "cpu")


def test_nan_in_the_middle_is_found_with_its_step(teachers: dict[str, Any]) -> None:
    """Losses are looked at now and then only; the step reported is nevertheless the first bad one."""
    calls = {"n": 0}
    forward = teachers["a"].forward

    def breaks_at_step_5(x: Tensor) -> Tensor:
        calls["n"] += 1
        return forward(x) * (float("inf") if calls["n"] == 1 + 5 + 1 else 1.0)  # one call finds the layers

    teachers["a"].forward = breaks_at_step_5
    with pytest.raises(RunError, match="step 5 of 30"):
        recover_unit(unit(iterations=30), images(), teachers, RecoverOptions(), DATA, "cpu")
