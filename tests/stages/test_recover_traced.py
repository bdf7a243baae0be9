"""Networks whose traces differ are told apart, and those that cannot be are said to be so."""

from __future__ import annotations

import functools
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.recover.traced import Untold, sources, traced_from
from stages.teachers.build import build_network
from stages.teachers.options import TeacherSpec


class Acting(nn.Module):
    def __init__(self, act: Any, **attributes: Any):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), act
        for name, value in attributes.items():
            setattr(self, name, value)


def own(x: torch.Tensor) -> torch.Tensor:
    return x


def leaky(x: torch.Tensor, *, slope: float = 0.1) -> torch.Tensor:
    return F.leaky_relu(x, slope)


def leakier() -> Any:
    """The same by name, with another default."""
    found = types.FunctionType(leaky.__code__, leaky.__globals__, leaky.__name__)
    found.__kwdefaults__ = {"slope": 0.2}
    return found


class Quiet:
    """Says nothing of what tells it from others."""

    def __repr__(self) -> str:
        return "Quiet()"


def scaled(factor: float) -> Any:
    def scale(x: torch.Tensor) -> torch.Tensor:
        return x * factor

    return scale


def test_what_is_traced_differently_is_told_apart() -> None:
    networks = [
        Acting(F.relu), Acting(F.silu), Acting(own), Acting(torch.relu), Acting(scaled(1.0)), Acting(scaled(2.0)),
        Acting(leaky), Acting(leakier()),
        Acting(functools.partial(F.leaky_relu, negative_slope=0.1)),
        Acting(functools.partial(F.leaky_relu, negative_slope=0.2)), Acting(nn.ReLU), Acting(nn.ReLU()),
        Acting(F.relu, flag=True), Acting(F.relu, flag=False), Acting(F.relu, sizes=[1]), Acting(F.relu, sizes=(1,)),
        Acting(F.relu, acts={"first": F.relu}), Acting(F.relu, acts={"first": F.silu}),
    ]  # fmt: skip
    texts = [str(traced_from(network)) for network in networks]
    assert len(set(texts)) == len(networks)


def test_weights_and_places_in_memory_do_not_count() -> None:
    first, second = (traced_from(Acting(F.relu, acts=[own, nn.ReLU()])) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("value", [lambda x: x, threading.Lock(), object(), [object()], Quiet(), {"a": lambda x: x}])
def test_what_cannot_be_told_is_said(value: Any) -> None:
    with pytest.raises(Untold):
        traced_from(Acting(value))


def test_hooks_are_not_told() -> None:
    network = Acting(F.relu)
    network.register_forward_hook(lambda *arguments: None)
    with pytest.raises(Untold):
        traced_from(network)


def test_a_file_that_changes_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "prism_traced_a.py").write_text("value = 1\n")
    (tmp_path / "prism_traced_b.py").write_text("value = 2\n")
    a, b = sources(["prism_traced_a"]), sources(["prism_traced_b"])
    assert a != b
    assert sources(["torch.nn", "prism_traced_b", "prism_traced_a"]) == [*a, *b]
    with pytest.raises(Untold):
        sources(["prism_traced_c"])


@pytest.mark.parametrize(
    "arch", ["builtin:resnet10", "timm:resnet18", "timm:efficientnet_b0", "torchvision:shufflenet_v2_x1_0"]
)
def test_known_architectures_are_told(arch: str) -> None:
    first, second = (str(traced_from(build_network(TeacherSpec(arch=arch), 4, 3, seed=seed))) for seed in (0, 1))
    assert first == second
