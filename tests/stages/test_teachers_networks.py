"""Architectures: built-in families at small sizes, names that exist and names that do not, a user's factory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from cluster.errors import UserError
from stages.teachers.build import bn_layers, build_network, check_arch, memory_format
from stages.teachers.networks import NETWORKS
from stages.teachers.options import NetworkSpec

SMALL = {
    "resnet10": {"width": 8},
    "resnet18": {"width": 8},
    "resnet34": {"width": 8},
    "convnet_d3": {"width": 8},
    "vgg_bn": {"width": 8},
    "mobilenetv2": {"width_mult": 0.25},
    "shufflenetv2": {"width_mult": 0.5},
    "wrn16_2": {"widen": 1},
}
# Counted by hand from the architectures' tables: stem, two a block, one a projection (not in pre-activation), last.
BN = {
    "resnet10": 1 + 4 * 2 + 3,
    "resnet18": 1 + 8 * 2 + 3,
    "resnet34": 1 + 16 * 2 + 3,
    "convnet_d3": 3,
    "vgg_bn": 8,
    "mobilenetv2": 1 + 2 + 16 * 3 + 1,
    "shufflenetv2": 1 + 16 * 3 + 3 * 2 + 1,
    "wrn16_2": 6 * 2 + 1,
}
# Parameters of the widely used CIFAR-10 versions at published width.
PUBLISHED = {"resnet18": 11_173_962, "wrn16_2": 691_674}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small(name: str, num_classes: int = 7, channels: int = 3) -> nn.Module:
    return build_network(NetworkSpec(arch=f"builtin:{name}", kwargs=SMALL[name]), num_classes, channels)


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_forward_backward(name, size, channels):
    network = small(name, channels=channels)
    x = torch.randn(4, channels, size, size, requires_grad=True)
    logits = network(x)
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    # Every image reaches its own logits, and the whole image does.
    assert (x.grad.abs().amax((1, 2, 3)) > 0).all()
    assert x.grad.abs().sum(1)[0].gt(0).float().mean() > 0.99


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_bn_layers_are_those_of_the_paper(name):
    assert len(bn_layers(small(name))) == BN[name]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_of_the_published_widths(name):
    network = build_network(NetworkSpec(arch=f"builtin:{name}"), 10, 3)
    assert sum(p.numel() for p in network.parameters()) == PUBLISHED[name]


def test_initial_activations_keep_their_scale():
    x = torch.randn(16, 3, 32, 32)
    for name in NETWORKS:
        logits = small(name).train()(x)
        assert 0.03 < logits.std() < 10, name


def test_weights_depend_on_the_seed_alone():
    first = small("resnet10").state_dict()
    before = torch.get_rng_state()
    torch.randn(5)
    torch.manual_seed(9)
    second = small("resnet10").state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = build_network(NetworkSpec(arch="builtin:resnet10", kwargs=SMALL["resnet10"]), 7, 3, seed=1).state_dict()
    assert not torch.equal(first["head.weight"], other["head.weight"])
    torch.set_rng_state(before)
    small("resnet10")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arch", "kwargs", "words"),
    [
        ("builtin:resnet19", {}, ["resnet19", "resnet18"]),
        ("timm:mobilenetv2_10", {}, ["mobilenetv2_10", "mobilenetv2_100"]),
        ("torchvision:resnet81", {}, ["resnet81", "resnet18"]),
        ("hub:resnet18", {}, ["SOURCE:NAME", "builtin", "timm", "torchvision", "user"]),
        ("resnet18", {}, ["SOURCE:NAME"]),
        ("builtin:resnet18", {"widht": 8}, ["widht", "kwargs"]),
        ("timm:resnet18", {"width": 8}, ["width", "kwargs"]),
        ("builtin:shufflenetv2", {"width_mult": 0.7}, ["0.7", "0.5, 1.0"]),
        ("builtin:wrn16_2", {"depth": 17}, ["17", "6n + 4"]),
        ("user:no.such.module:make", {}, ["no.such.module", "importable"]),
        ("user:nothing.py:make", {}, ["nothing.py", "no file"]),
        ("user:factory", {}, ["user:package.module:factory"]),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_said(arch, kwargs, words):
    with pytest.raises(UserError) as error:
        build_network(NetworkSpec(arch=arch, kwargs=kwargs), 10, 3)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_torchvision_takes_colour_only():
    with pytest.raises(UserError, match="colour"):
        build_network(NetworkSpec(arch="torchvision:resnet18"), 10, 1)


def test_timm_and_torchvision_count_alike():
    """BatchNormAct2d of timm counts; figures of the reference table (torchvision)."""
    assert len(bn_layers(build_network(NetworkSpec(arch="torchvision:mobilenet_v2"), 10, 3))) == 52
    network = build_network(NetworkSpec(arch="timm:mobilenetv2_100"), 10, 3)
    assert len(bn_layers(network)) == 52
    assert sum(layer.num_features for layer in bn_layers(network)) == 17_056
    assert len(bn_layers(build_network(NetworkSpec(arch="torchvision:alexnet"), 10, 3))) == 0


USER = """
from torch import nn

def make(num_classes, hidden=4):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(hidden), nn.Linear(hidden, num_classes))

def broken(num_classes):
    raise RuntimeError("no licence")

def number(num_classes):
    return 5
"""


def test_user_factories(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(USER)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.py").write_text(USER.replace("hidden=4", "hidden=6"))
    spec = NetworkSpec(arch=f"user:{tmp_path / 'mine.py'}:make", kwargs={"hidden": 3})
    check_arch(spec.arch)
    assert build_network(spec, 9, 3)[2].weight.shape == (9, 3)
    # A second file of the same name is another module.
    same_name = NetworkSpec(arch=f"user:{tmp_path / 'other' / 'mine.py'}:make")
    assert build_network(same_name, 9, 3)[2].weight.shape == (9, 6)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build_network(NetworkSpec(arch="user:mine:make"), 9, 3)[2].weight.shape == (9, 4)
    for function, word in (("maek", "make"), ("broken", "no licence"), ("number", "Module")):
        with pytest.raises(UserError, match=word):
            build_network(NetworkSpec(arch=f"user:mine:{function}"), 9, 3)


LAYOUT = """
import torch
from stages.teachers.networks import NETWORKS
torch.set_num_threads(1)
for network in (NETWORKS["resnet10"](10, CHANNELS, width=4), NETWORKS["wrn16_2"](10, CHANNELS, widen=0.25)):
    network.to(memory_format=torch.channels_last)
    for _ in range(3):
        network(torch.randn(64, 28, 28, CHANNELS).permute(0, 3, 1, 2)).sum().backward()
"""


@pytest.mark.parametrize("channels", [1, 3])
def test_narrow_networks_do_not_crash(channels):
    """oneDNN's strided 1×1 convolution of fewer than 8 channels, laid out channels last, would end the process."""
    subprocess.run([sys.executable, "-c", LAYOUT.replace("CHANNELS", str(channels))], check=True)


def test_layout():
    assert memory_format(small("resnet10")) == torch.channels_last
    assert memory_format(nn.Sequential(nn.Conv2d(4, 8, 1, 2))) == torch.contiguous_format
    assert memory_format(nn.Sequential(nn.Conv2d(8, 8, 1, 2), nn.Conv2d(4, 8, 3, 2))) == torch.channels_last
