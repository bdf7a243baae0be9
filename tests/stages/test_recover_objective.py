"""The objective against float64 reference code written from the formulas, loop by loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import RunError, UserError
from stages.recover.objective import BNTap, recovery_loss, tap_teachers
from stages.recover.options import RecoverOptions


class Tiny(nn.Module):
    """Three BN layers, the second on a residual branch, with random statistics; a stand-in for a teacher."""

    def __init__(self, seed: int, channels: int = 4, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, 2 * channels, 1, stride=2), nn.BatchNorm2d(2 * channels)
        self.head = nn.Linear(2 * channels, 5)
        self.tail_runs = 0
        for bn in self.bn_layers:
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.2, 3)
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias)
        self.to(dtype).eval().requires_grad_(False)

    @property
    def bn_layers(self) -> list[nn.BatchNorm2d]:
        return [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = x + F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        self.tail_runs += 1
        return self.head(x.mean((2, 3)))

    def reference(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and BN inputs, BN written out."""

        def norm(z: Tensor, bn: nn.BatchNorm2d) -> Tensor:
            channels = [
                (z[:, c] - bn.running_mean[c]) / (bn.running_var[c] + bn.eps).sqrt() * bn.weight[c] + bn.bias[c]
                for c in range(z.shape[1])
            ]
            return torch.stack(channels, 1)

        z1 = F.conv2d(x, self.conv1.weight, self.conv1.bias, padding=1)
        h = norm(z1, self.bn1).clamp_min(0)
        z2 = F.conv2d(h, self.conv2.weight, self.conv2.bias, padding=1)
        h = h + norm(z2, self.bn2).clamp_min(0)
        z3 = F.conv2d(h, self.conv3.weight, self.conv3.bias, stride=2)
        h = norm(z3, self.bn3).clamp_min(0)
        return h.flatten(2).sum(2) / h[0, 0].numel() @ self.head.weight.T + self.head.bias, [z1, z2, z3]


class NoNorm(Tiny):
    """The published pool's AlexNet: no BatchNorm at all."""

    bn_layers: list[nn.BatchNorm2d] = []  # type: ignore[assignment]


def reference_l_bn(
    inputs: list[Tensor], layers: list[nn.BatchNorm2d], first: float, var_weight: float, norm: str = "none"
) -> Tensor:
    """Σ_l w_l (‖m − μ‖ + var_weight ‖v − s‖), channel by channel; normalised by root-mean-squares in place of norms."""
    total = torch.zeros((), dtype=torch.float64)
    whole = 0.0
    for index, (z, bn) in enumerate(zip(inputs, layers, strict=True)):
        mean_square, var_square = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for c in range(z.shape[1]):
            values = z[:, c].flatten()
            mu = values.sum() / len(values)
            s = ((values - mu) ** 2).sum() / len(values)
            mean_square = mean_square + (bn.running_mean[c] - mu) ** 2
            var_square = var_square + (bn.running_var[c] - s) ** 2
        if norm == "per_layer":
            mean_square, var_square = mean_square / z.shape[1], var_square / z.shape[1]
        weight = first if index == 0 else 1.0
        total = total + weight * (mean_square.sqrt() + var_weight * var_square.sqrt())
        whole += weight * z.shape[1] ** 0.5
    return total / whole if norm == "per_teacher" else total


def reference_loss(
    x: Tensor, y: Tensor, logit: list[Tiny], bn: list[Tiny], divisor: int, options: RecoverOptions
) -> tuple[Tensor, Tensor, list[Tensor]]:
    ce = torch.zeros((), dtype=torch.float64)
    for teacher in logit:
        for row, label in zip(teacher.reference(x)[0], y.tolist(), strict=True):
            ce = ce + (row.exp().sum().log() - row[label]) / len(y) / len(logit)
    terms = [
        reference_l_bn(t.reference(x)[1], t.bn_layers, options.first_bn_multiplier, options.var_weight) for t in bn
    ]
    total = torch.zeros((), dtype=torch.float64)
    for term in terms:
        total = total + term
    return ce + options.r_bn * total / divisor, ce, terms


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(100)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    return x, torch.tensor([0, 1, 2, 3, 4, 0])


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Relative error of the whole vector at most 1e-6."""
    assert ((ours - theirs).norm() <= 1e-6 * theirs.norm()).item()


@pytest.mark.parametrize("norm", ["none", "per_layer", "per_teacher"])
@pytest.mark.parametrize(("first", "var_weight"), [(10.0, 1.0), (1.0, 1.0), (10.0, 0.3), (0.0, 2.0)])
def test_l_bn_and_its_gradient(batch: tuple[Tensor, Tensor], first: float, var_weight: float, norm: str) -> None:
    x, _ = batch
    teacher = Tiny(1)
    options = RecoverOptions(first_bn_multiplier=first, var_weight=var_weight, bn_norm=norm)
    _, ours = BNTap("t", teacher, x, options)(x, logits=False)
    theirs = reference_l_bn(teacher.reference(x)[1], teacher.bn_layers, first, var_weight, norm)
    assert_same(ours, theirs)
    assert_same(torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, x)[0])


@pytest.mark.parametrize(
    ("logit", "bn"),
    [(["a"], ["a"]), (["a"], ["a", "b", "c"]), (["a"], ["b", "c"]), (["a", "b"], ["b", "c"])],
)
def test_whole_objective(batch: tuple[Tensor, Tensor], logit: list[str], bn: list[str]) -> None:
    x, y = batch
    teachers = {name: Tiny(i, channels=3 + i) for i, name in enumerate("abc")}
    options = RecoverOptions(r_bn=0.37)
    taps = tap_teachers(teachers, logit, bn, x.detach()[:1], options)
    runs = {name: t.tail_runs for name, t in teachers.items()}
    loss, ce, l_bn = recovery_loss(x, y, taps, logit, bn, options)
    ref_loss, ref_ce, ref_terms = reference_loss(
        x, y, [teachers[n] for n in logit], [teachers[n] for n in bn], len(bn), options
    )
    assert_same(loss, ref_loss)
    assert_same(ce, ref_ce)
    assert list(l_bn) == bn
    for ours, theirs in zip(l_bn.values(), ref_terms, strict=True):
        assert_same(ours, theirs)
    assert_same(torch.autograd.grad(loss, x)[0], torch.autograd.grad(ref_loss, x)[0])
    # The primary runs once for both losses; auxiliaries never reach their heads.
    assert {n: t.tail_runs - runs[n] for n, t in teachers.items()} == {n: int(n in logit) for n in teachers}


def test_teacher_without_bn_counts_in_the_divisor(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    teachers = {"a": Tiny(0), "alexnet": NoNorm(1)}
    options = RecoverOptions(allow_null_bn=True)
    taps = tap_teachers(teachers, ["a"], ["a", "alexnet"], x.detach()[:1], options)
    loss, _, l_bn = recovery_loss(x, y, taps, ["a"], ["a", "alexnet"], options)
    assert l_bn["alexnet"] == 0
    assert teachers["alexnet"].tail_runs == 0
    ref, _, _ = reference_loss(x, y, [teachers["a"]], [teachers["a"]], 2, options)
    assert_same(loss, ref)
    assert_same(torch.autograd.grad(loss, x)[0], torch.autograd.grad(ref, x)[0])


def test_teacher_without_bn_is_refused_by_name(batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    teachers = {"a": Tiny(0), "alexnet": NoNorm(1)}
    with pytest.raises(UserError, match=r"bn_teachers: alexnet has no BatchNorm"):
        tap_teachers(teachers, ["a"], ["a", "alexnet"], x.detach()[:1], RecoverOptions())
    # As a source of logits alone it is welcome.
    tap_teachers(teachers, ["alexnet"], ["a"], x.detach()[:1], RecoverOptions())


@pytest.mark.parametrize("matched", ["mean", "var", "both"])
def test_gradient_at_norm_zero(matched: str) -> None:
    """Statistics that agree exactly must not divide by zero; the other term keeps its gradient."""
    x = torch.tensor([[[[1.0, 3.0]]], [[[5.0, 7.0]]]], dtype=torch.float64, requires_grad=True)  # mean 4, var 5
    bn = nn.BatchNorm2d(1).double().eval().requires_grad_(False)
    bn.running_mean.fill_(4.0 if matched != "var" else 1.0)
    bn.running_var.fill_(5.0 if matched != "mean" else 2.0)
    net = nn.Sequential(bn)
    net.bn_layers = [bn]  # type: ignore[assignment]
    options = RecoverOptions(first_bn_multiplier=1.0)
    _, value = BNTap("t", net, x, options)(x, logits=False)
    (grad,) = torch.autograd.grad(value, x)
    expected_value = {"mean": 3.0, "var": 3.0, "both": 0.0}[matched]
    expected = {
        # d|5 − 2| = 2(x − 4)/4; d|4 − 1| = 1/4
        "mean": [(v - 4) / 2 for v in (1, 3, 5, 7)],
        "var": [0.25] * 4,
        "both": [0.0] * 4,
    }[matched]
    assert value.item() == expected_value
    assert grad.flatten().tolist() == expected


def test_variance_is_biased() -> None:
    x = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    bn = nn.BatchNorm2d(1).eval().requires_grad_(False)
    bn.running_mean.fill_(3.0)
    bn.running_var.fill_(1.0)
    net = nn.Sequential(bn)
    net.bn_layers = [bn]  # type: ignore[assignment]
    _, value = BNTap("t", net, x, RecoverOptions(first_bn_multiplier=1.0))(x, logits=False)
    assert value.item() == 3.0  # biased 4 − 1; the unbiased variance would be 8


def test_early_stop_equals_the_full_forward(batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    teacher = Tiny(4)
    tap = BNTap("t", teacher, x.detach()[:1], RecoverOptions())
    bn_runs = []
    handle = teacher.bn3.register_forward_hook(lambda *_: bn_runs.append(1))
    before = teacher.tail_runs
    none, short = tap(x, logits=False)
    assert (none, teacher.tail_runs, bn_runs) == (None, before, [])
    logits, full = tap(x, logits=True)
    assert teacher.tail_runs == before + 1
    assert len(bn_runs) == 1
    handle.remove()
    assert torch.equal(short, full)
    assert torch.equal(torch.autograd.grad(short, x)[0], torch.autograd.grad(full, x)[0])
    assert torch.equal(logits, teacher(x))


def test_leaves_no_hooks_behind(batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    teacher = Tiny(4)
    tap = BNTap("t", teacher, x.detach()[:1], RecoverOptions())
    tap(x, logits=False)
    tap(x, logits=True)
    with pytest.raises(RuntimeError):
        tap(x[:, :2], logits=True)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in teacher.modules())


def _module(forward: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.never, self.bn = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.bn_layers = [self.never, self.bn]

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return Odd().double().eval().requires_grad_(False)


def test_layer_that_never_runs_is_left_out(batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    odd = _module(lambda m, x: m.bn(x).mean((2, 3)))
    _, value = BNTap("odd", odd, x.detach()[:1], RecoverOptions())(x, logits=False)
    # The first layer that runs carries the multiplier.
    assert_same(value, reference_l_bn([x], [odd.bn], 10.0, 1.0))


def test_layer_that_runs_twice_is_refused(batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    with pytest.raises(UserError, match=r"teachers\.odd: a BatchNorm layer runs more than once"):
        BNTap("odd", _module(lambda m, x: m.bn(m.bn(x)).mean((2, 3))), x.detach()[:1], RecoverOptions())


def test_layer_skipped_later_is_an_error(batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    odd = _module(lambda m, x: (m.bn(x) if len(x) == 1 else x).mean((2, 3)))
    tap = BNTap("odd", odd, x.detach()[:1], RecoverOptions())
    with pytest.raises(RunError, match="odd"):
        tap(x, logits=True)


def test_odd_images_cost_no_digits() -> None:
    """One pass over a batch some of whose images are far from all others, by either end."""
    rng = torch.Generator().manual_seed(0)
    for odd in (slice(0, 1), slice(-1, None), slice(0, 200, 25), slice(10, 11)):
        x = torch.randn(200, 3, 4, 4, generator=rng) + 50
        x[odd] += 1000
        net = nn.Sequential(nn.BatchNorm2d(3).eval().requires_grad_(False))
        net.bn_layers = [net[0]]  # type: ignore[assignment]
        _, found = BNTap("t", net, x, RecoverOptions(first_bn_multiplier=1.0))(x, logits=False)
        exact = x.double()
        mean, var = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
        assert found.item() == pytest.approx((mean.norm() + (var - 1).norm()).item(), rel=5e-6)


def test_a_layer_of_zeros_has_a_gradient_of_zeros() -> None:
    """Both norms are 0, and the weight of one is large."""
    bn = nn.BatchNorm2d(2).eval().requires_grad_(False)
    bn.running_var.zero_()
    net = nn.Sequential(bn)
    net.bn_layers = [bn]  # type: ignore[assignment]
    x = torch.zeros(1, 2, 4, 4, requires_grad=True)
    _, value = BNTap("t", net, x, RecoverOptions(var_weight=1000.0))(x, logits=False)
    (gradient,) = torch.autograd.grad(value, x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_float32_is_near_float64(batch: tuple[Tensor, Tensor]) -> None:
    """Activations far from zero, where a variance from E[x²] − E[x]² would lose its digits."""
    x = batch[0].detach() + 100
    single = Tiny(2, dtype=torch.float32)
    double = Tiny(2)
    _, ours = BNTap("t", single, x.float(), RecoverOptions())(x.float(), logits=False)
    theirs = reference_l_bn(double.reference(x)[1], double.bn_layers, 10.0, 1.0)
    assert math.isclose(ours.item(), theirs.item(), rel_tol=1e-4)
