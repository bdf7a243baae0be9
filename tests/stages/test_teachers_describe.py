"""Facts of networks found without running them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import UserError
from stages.teachers.build import bn_layers, build_network
from stages.teachers.describe import NetworkFacts, describe_network
from stages.teachers.options import NetworkSpec

USER = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, kind):
        super().__init__()
        self.kind = kind
        self.first, self.shared = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.bare = nn.BatchNorm2d(3, track_running_stats=False)
        self.never = nn.BatchNorm2d(5)
        self.head = nn.Linear(3, classes)

    def forward(self, x):
        x = self.bare(self.bare(self.shared(self.first(x))))
        if self.kind == "twice":
            x = self.shared(x)
        out = self.head(x.mean((2, 3)))
        return {"tuple": (out, out), "dict": {"logits": out}}.get(self.kind, out)

def make(num_classes, kind): return Net(num_classes, kind)
"""


def facts(tmp_path: Path, kind: str) -> NetworkFacts:
    (tmp_path / "mine.py").write_text(USER)
    spec = NetworkSpec(arch=f"user:{tmp_path / 'mine.py'}:make", kwargs={"kind": kind})
    return describe_network(spec, num_classes=4, channels=3, image_size=8, field="teachers.t")


def test_layers_without_statistics_do_not_count(tmp_path):
    assert facts(tmp_path, "plain").bn_channels == [3, 3, 5]


def test_layers_that_run_twice_are_named(tmp_path):
    assert facts(tmp_path, "plain").bn_repeated == []
    assert facts(tmp_path, "twice").bn_repeated == ["shared"]


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_networks_that_return_something_else(tmp_path, kind):
    words = (
        rf"^teachers\.t: user:.* returned a {kind}; its factory must return a network that gives logits \[B, classes\]$"
    )
    with pytest.raises(UserError, match=words):
        facts(tmp_path, kind)


@pytest.mark.parametrize("arch", ["builtin:resnet18", "timm:mobilenetv2_100"])
def test_usual_networks(arch):
    spec = NetworkSpec(arch=arch)
    found = describe_network(spec, num_classes=10, channels=3, image_size=32, field="f")
    network = build_network(spec, 10, 3)
    assert found.bn_channels == [layer.num_features for layer in bn_layers(network)]
    assert found.bn_repeated == []
    assert found.parameters == sum(p.numel() for p in network.parameters())


def test_elements_of_batch_norm_inputs() -> None:
    """Three layers of 64 channels, each at half the size of the one before."""
    spec = NetworkSpec(arch="builtin:convnet_d3", kwargs={"width": 64})
    facts = describe_network(spec, num_classes=10, channels=3, image_size=32, field="x")
    assert facts.bn_elements == 64 * (32 * 32 + 16 * 16 + 8 * 8)
