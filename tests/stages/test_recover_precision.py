"""How near the numbers of a step are to float64, network by network."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.data import DataSpec
from stages.recover.objective import LocalObjective, Measured, _LayerDistance
from stages.recover.options import RecoverOptions
from stages.recover.reference import ReferenceStep
from stages.teachers.build import build_network, memory_format
from stages.teachers.options import TeacherSpec
from stages.teachers.teacher import Teacher

BUILTIN = ("resnet10", "convnet_d3", "vgg_bn", "mobilenetv2", "shufflenetv2", "wrn16_2")
TIMM = (
    "resnet18", "resnet34", "resnet50", "resnet50d", "wide_resnet50_2", "resnext50_32x4d", "seresnet50", "res2net50d",
    "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100", "efficientnet_b0", "efficientnetv2_rw_t",
    "mnasnet_100", "fbnetc_100", "spnasnet_100", "ghostnet_100", "mixnet_s", "densenet121", "dla34", "hrnet_w18_small",
    "regnetx_002", "regnety_002", "repvgg_a0", "vgg11_bn", "vovnet39a", "cspresnet50", "hardcorenas_a", "tinynet_e",
    "rexnet_100", "selecsls42b", "dpn48b",
)  # fmt: skip
ARCHS = [f"builtin:{name}" for name in BUILTIN] + [f"timm:{name}" for name in TIMM]
# Cosines of those whose gradients bfloat16 turns further, with random weights and four images of 96 px.
TURNED = {"timm:efficientnet_b0": 0.96, "timm:vovnet39a": 0.96}
# Of torch and of timm, by name.
SMOOTH = {
    **dict.fromkeys(("ReLU", "ReLU6", "LeakyReLU"), nn.SiLU),
    **dict.fromkeys(("Hardswish", "HardSwish"), nn.SiLU),
    **dict.fromkeys(("Hardsigmoid", "HardSigmoid"), nn.Sigmoid),
}


def network_of(arch: str, smoothed: bool = False) -> nn.Module:
    """In float64, with the statistics of some images, give or take a little.

    Those of a fresh network, 0 and 1, would let activations grow from layer to layer, up to 1e70 in some.
    """
    network = build_network(TeacherSpec(arch=arch), 10, 3, seed=1).eval()
    if smoothed:
        smooth(network)
    rng = torch.Generator().manual_seed(2)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1.0
        layer.train()
    with torch.no_grad():
        network(torch.randn(32, 3, *[size_of(arch)] * 2, generator=rng))
    network.double()
    for layer in layers:
        layer.eval()
        if layer.running_mean is not None:
            mean, var = layer.running_mean, layer.running_var
            assert mean is not None
            assert var is not None
            mean += 0.01 * var.sqrt() * torch.randn(mean.shape, generator=rng, dtype=mean.dtype)
            var *= 0.98 + 0.04 * torch.rand(var.shape, generator=rng, dtype=var.dtype)
    return network


def smooth(network: nn.Module) -> None:
    """Give it smooth activations.

    Where an activation lies at a kink, float32 and float64 take different sides of it, whatever the code: one sign of a
    ReLU moves the whole gradient by up to 1e-3. In bfloat16 one sign in a few hundred is another at every layer.
    """
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d):
                sizes = child.kernel_size, child.stride, child.padding, child.ceil_mode
                setattr(module, name, nn.AvgPool2d(*sizes))
            elif type(child).__name__ in SMOOTH:
                setattr(module, name, SMOOTH[type(child).__name__]())


def batch(size: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(4, 3, size, size, generator=rng, dtype=torch.float64), torch.arange(4)


def exact(network: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the reference."""
    x, y = batch(size)
    x = x.requires_grad_()
    loss = ReferenceStep({"t": copy.deepcopy(network)}, "t", ["t"], r_bn=0.1).loss(x, y)
    return loss.detach(), torch.autograd.grad(loss, [x])[0]


def bound(network: nn.Module, size: int) -> float:
    """Of the loss's relative error: 1e-5, or twice the reference's in float32 where a network is in that condition."""
    (x, y), double = batch(size), exact(network, size)[0]
    single = ReferenceStep({"t": copy.deepcopy(network).float()}, "t", ["t"], r_bn=0.1).loss(x.float(), y).detach()
    return max(1e-5, 2 * abs(single.item() / double.item() - 1))


def ours(network: nn.Module, size: int, **options: object) -> Measured:
    data = DataSpec(size, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), tuple("abcdefghij"))
    teacher = Teacher("t", copy.deepcopy(network), data, num_outputs=10).float()
    teacher = teacher.to(memory_format=memory_format(teacher.network))  # type: ignore[call-overload]
    objective = LocalObjective({"t": teacher}, RecoverOptions(r_bn=0.1, **options))  # type: ignore[arg-type]
    x, y = batch(size)
    objective.prepare(["t"], ["t"], x[:1].float())
    return objective.step(x.float(), y, ["t"], ["t"])


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def size_of(arch: str) -> int:
    return 32 if arch.startswith("builtin:") else 96


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_float32_against_float64(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, network = size_of(arch), network_of(arch)
    loss, gradient = exact(network, size)
    found = ours(network, size)
    assert found.loss.item() == pytest.approx(loss.item(), rel=bound(network, size))
    # A few signs.
    assert cosine(found.gradient, gradient) >= 0.999
    monkeypatch.setattr(F, "relu", F.silu)
    network = network_of(arch, smoothed=True)
    loss, gradient = exact(network, size)
    found = ours(network, size)
    assert found.loss.item() == pytest.approx(loss.item(), rel=bound(network, size))
    assert cosine(found.gradient, gradient) >= 0.99999
    assert distance(found.gradient, gradient) <= 1e-4


@pytest.mark.parametrize(
    "arch", ["builtin:convnet_d3", *[pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS[:1] + ARCHS[2:]]]
)
def test_bfloat16_points_the_same_way(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics and losses are float32, and the gradient hardly turns, see ``smooth``."""
    monkeypatch.setattr(F, "relu", F.silu)
    size, network = size_of(arch), network_of(arch, smoothed=True)
    full, half = ours(network, size), ours(network, size, precision="bf16")
    assert half.loss.dtype == half.gradient.dtype == torch.float32
    assert cosine(half.gradient, full.gradient) >= TURNED.get(arch, 0.98)
    assert half.l_bn["t"].item() == pytest.approx(full.l_bn["t"].item(), rel=0.15)
    # It is another precision, not another name.
    assert distance(half.gradient, full.gradient) > 1e-4


def test_statistics_of_bfloat16_activations_are_float32() -> None:
    """In bfloat16 a mean over so many pixels would be off by more than this."""
    rng = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 2, 64, 64, generator=rng) + 3).bfloat16()
    mean, var = torch.tensor([2.9, 3.1]), torch.tensor([1.1, 0.9])
    wide = x.double().requires_grad_()
    expected = (wide.mean((0, 2, 3)) - mean).norm() + (wide.var((0, 2, 3), correction=0) - var).norm()
    expected.backward()
    narrow = x.clone().requires_grad_()
    found = _LayerDistance.apply(narrow, mean, var, 1.0)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert narrow.grad is not None
    assert wide.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    assert distance(narrow.grad, wide.grad) < 0.01
