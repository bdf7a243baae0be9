"""Compiled teachers measure what the others measure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cluster.errors import UserError
from stages.data import DataSpec
from stages.recover.core import recover_unit
from stages.recover.objective import BNTap, LocalObjective
from stages.recover.options import RecoverOptions
from stages.recover.unit import RecoverUnit
from stages.teachers.teacher import Teacher

DATA = DataSpec(12, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), tuple("abcde"))


class Small(nn.Module):
    """Two BN layers and a tail behind them."""

    def __init__(self, channels: int, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, stride=2), nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 5)
        for bn in (self.bn1, self.bn2):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.silu(self.bn1(self.conv1(x)))
        return self.head(torch.nn.functional.silu(self.bn2(self.conv2(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def teachers() -> dict[str, Teacher]:
    return {f"t{c}": Teacher(f"t{c}", Small(c, seed=c), DATA, num_outputs=5) for c in (4, 6)}


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 3, 12, 12), torch.arange(5)


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


def objective(teachers: dict[str, Teacher], compiled: bool, **options: object) -> LocalObjective:
    return LocalObjective(teachers, RecoverOptions(r_bn=0.5, compile=compiled, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("logits", "matched"),
    [(["t4"], ["t4"]), pytest.param(["t6"], ["t4", "t6"], marks=pytest.mark.slow)],
    ids=["one teacher for both", "two"],
)
def test_equals_what_is_not_compiled(
    teachers: dict[str, Teacher], batch: tuple[Tensor, Tensor], logits: list[str], matched: list[str]
) -> None:
    x, y = batch
    found = []
    for compiled in (False, True):
        one = objective(teachers, compiled)
        one.prepare(logits, matched, x[:1])
        found.append(one.step(x, y, logits, matched))
    plain, fast = found
    torch.testing.assert_close(fast.loss, plain.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(fast.gradient, plain.gradient, rtol=1e-4, atol=1e-7)
    assert fast.l_bn.keys() == plain.l_bn.keys() == set(matched)


@pytest.mark.slow
def test_a_unit_has_the_same_bytes_every_time(teachers: dict[str, Teacher], batch: tuple[Tensor, Tensor]) -> None:
    """With subsets drawn at every step; compiled anew or not."""
    unit = RecoverUnit(
        ipc=0, chunk=0, classes=list(range(5)), logit_teachers=["t4"], bn_teachers=["t4", "t6"], iterations=6, seed=1
    )
    options = RecoverOptions(selection="per_step", include_prob=0.5, roll=2, lr=0.1, compile=True)
    first = recover_unit(unit, batch[0], teachers, options, DATA, "cpu")
    again = recover_unit(unit, batch[0], teachers, options, DATA, "cpu")
    torch.compiler.reset()
    anew = recover_unit(unit, batch[0], teachers, options, DATA, "cpu")
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.pixels, anew.pixels)
    plain = recover_unit(unit, batch[0], teachers, options.model_copy(update={"compile": False}), DATA, "cpu")
    assert (first.pixels.int() - plain.pixels.int()).abs().max() <= 1


@pytest.mark.slow
def test_shares_the_weights_and_leaves_the_teacher_alone(
    teachers: dict[str, Teacher], batch: tuple[Tensor, Tensor]
) -> None:
    teacher = teachers["t4"]
    tap = BNTap("t4", teacher, batch[0][:1], RecoverOptions(compile=True))
    before = tap(batch[0], logits=True)[0]
    assert all(not m._forward_pre_hooks for m in teacher.modules())
    with torch.no_grad():
        teacher.network.head.bias += 1  # type: ignore[union-attr, operator]
    after = tap(batch[0], logits=True)[0]
    with torch.no_grad():
        teacher.network.head.bias -= 1  # type: ignore[union-attr, operator]
    assert before is not None
    torch.testing.assert_close(after, before + 1)


@pytest.mark.slow
def test_more_teachers_and_shapes_than_torch_recompiles(batch: tuple[Tensor, Tensor]) -> None:
    """torch gives up on a code object after eight; ten teachers with two shapes each have twenty."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    try:
        for seed in range(10):
            teacher = Teacher("t", Small(2, seed), DATA, num_outputs=5)
            tap = BNTap("t", teacher, batch[0][:1], RecoverOptions(compile=True))
            for count in (5, 3):
                tap(batch[0][:count], logits=False)
    finally:
        torch._dynamo.config.fail_on_recompile_limit_hit = False


def test_a_machine_without_a_compiler(
    teachers: dict[str, Teacher], batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    tap = BNTap("t4", teachers["t4"], batch[0][:1], RecoverOptions(compile=True))
    with pytest.raises(UserError, match=r"recover\.compile: .* t4 \(.*compiler.*\); set recover\.compile=false"):
        tap(batch[0].clone().requires_grad_(), logits=True)
