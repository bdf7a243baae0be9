"""Cheaper forms of frozen layers are the same functions."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from stages.data import DataSpec
from stages.recover.compiled import CompiledTeacher
from stages.recover.frozen import fold_batch_norm, widen_depthwise_gradients
from stages.recover.objective import BNTap
from stages.recover.options import RecoverOptions
from stages.teachers.build import bn_layers
from stages.teachers.teacher import Teacher


def statistics(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """With statistics and weights unlike those of a fresh layer."""
    generator = torch.Generator().manual_seed(3)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.normal_(generator=generator)
    layer.running_var.uniform_(0.2, 3, generator=generator)
    if layer.affine:
        with torch.no_grad():
            layer.weight.normal_(generator=generator)
            layer.bias.normal_(generator=generator)
    return layer.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(5, eps=0.1),
        nn.BatchNorm2d(5, affine=False),
        BatchNormAct2d(5, act_layer=nn.SiLU),
        BatchNormAct2d(5, apply_act=False),
    ],
    ids=["plain", "without weights", "with activation", "with none"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_is_the_same_function(layer: nn.BatchNorm2d, dtype: torch.dtype) -> None:
    layer = statistics(layer)
    folded = nn.Sequential(copy.deepcopy(layer))
    fold_batch_norm(folded)
    assert type(folded[0]) is not type(layer)
    # Still found, with what is matched.
    assert next(found.running_mean for found in bn_layers(folded)).equal(layer.running_mean)
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 4).to(dtype).requires_grad_()
    exact, found = copy.deepcopy(layer).double()(x.double()), folded(x)
    assert found.dtype == dtype
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 4e-3}
    torch.testing.assert_close(found.double(), exact, **close)
    slopes = [torch.autograd.grad(out.sum(), x)[0].double() for out in (exact, found)]
    torch.testing.assert_close(slopes[1], slopes[0], **close)


class Other(nn.BatchNorm2d):
    """Adds something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_what_computes_in_ways_of_its_own_is_left_alone() -> None:
    network = nn.Sequential(Other(3), nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm1d(3))
    before = [type(layer) for layer in network]
    fold_batch_norm(network)
    assert [type(layer) for layer in network] == before


def test_no_layer_of_common_networks_is_missed() -> None:
    for name in ("resnet18", "efficientnet_b0", "densenet121"):
        network = timm.create_model(name).eval()
        fold_batch_norm(network)
        assert {type(layer).__name__ for layer in bn_layers(network)} <= {"_Folded", "_FoldedAct"}


@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), [(3, 2, 1, 9), (5, 2, 2, 8), (3, (2, 1), 0, 7)])
def test_wide_gradient_is_that_of_the_convolution(
    kernel: int, stride: int | tuple[int, int], padding: int, size: int
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, kernel, stride, padding, groups=4, bias=kernel == 5).requires_grad_(False)
    wide = nn.Sequential(copy.deepcopy(layer))
    widen_depthwise_gradients(wide)
    assert type(wide[0]) is not nn.Conv2d
    x = torch.randn(2, 4, size, size + 1, requires_grad=True)
    expected, found = layer(x), wide(x)
    assert torch.equal(found, expected)
    grad = torch.randn_like(expected)
    slopes = [torch.autograd.grad(out, x, grad)[0] for out in (expected, found)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-5, atol=1e-6)
    # Where the forward pass is in bfloat16, with the weights before they were rounded for it.
    with torch.autocast("cpu", torch.bfloat16):
        out = wide(x)
    assert out.dtype == torch.bfloat16
    (slope,) = torch.autograd.grad(out, x, grad.bfloat16())
    (exact,) = torch.autograd.grad(layer(x), x, grad.bfloat16().float())
    torch.testing.assert_close(slope, exact, rtol=1e-5, atol=1e-6)


def test_other_convolutions_are_left_alone() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3, 1, groups=4), nn.Conv2d(4, 8, 3, 2), nn.Conv2d(4, 8, 3, 2, groups=4),
        nn.Conv2d(4, 4, 3, 2, dilation=2, groups=4), nn.Conv2d(4, 4, 3, 2, 1, groups=4, padding_mode="reflect"),
    )  # fmt: skip
    widen_depthwise_gradients(network)
    assert {type(layer) for layer in network} == {nn.Conv2d}


@pytest.mark.parametrize(("precision", "widened"), [("bf16", True), ("fp32", False)])
def test_teachers_of_bf16_are_widened_on_cpus(precision: str, widened: bool) -> None:
    data = DataSpec(8, 3, (0.5,) * 3, (0.5,) * 3, ("a", "b"))
    depthwise = nn.Conv2d(3, 3, 3, 2, 1, groups=3)
    network = nn.Sequential(depthwise, nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    teacher = Teacher("t", network, data, num_outputs=2)
    BNTap("t", teacher, torch.zeros(1, 3, 8, 8), RecoverOptions.model_validate({"precision": precision}))
    assert (type(depthwise) is not nn.Conv2d) == widened


def test_compiled_teachers_have_folded_layers() -> None:
    """In their copy alone."""
    data = DataSpec(8, 3, (0.5,) * 3, (0.5,) * 3, ("a", "b"))
    network = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    teacher = Teacher("t", network, data, num_outputs=2)
    made = CompiledTeacher("t", teacher, [network[1]], lambda layer, x: x.sum(), True, torch.zeros(1, 3, 8, 8))
    assert "_Folded" in str(made._known[0])
    assert type(network[1]) is nn.BatchNorm2d
