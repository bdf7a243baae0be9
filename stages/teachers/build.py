"""An architecture's name to a network with fresh weights."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from cluster.errors import UserError, first_line
from stages.teachers.arch import split_arch
from stages.teachers.networks import NETWORKS
from stages.teachers.options import NetworkSpec


def check_arch(arch: str) -> None:
    """Prove that the architecture exists, without building it or importing a user's code.

    Raises:
        UserError: unknown source or name; says the nearest valid names.
    """
    source, name = split_arch(arch)
    if source == "builtin":
        _check_name(arch, name, NETWORKS)
    elif source == "timm":
        import timm

        if not timm.is_model(name):
            _check_name(arch, name, timm.list_models())
    elif source == "torchvision":
        import torchvision

        _check_name(arch, name, torchvision.models.list_models(module=torchvision.models))
    else:
        where, function = _split_user(arch, name)
        if where.endswith(".py") and not Path(where).expanduser().is_file():
            raise UserError(f"arch: {arch!r}: there is no file {where}; give a path that exists on every machine")
        if not function.isidentifier():
            raise UserError(f"arch: {arch!r}: {function!r} is not a function's name")


def build_network(spec: NetworkSpec, num_classes: int, channels: int, seed: int = 0) -> nn.Module:
    """A network with fresh weights; equal arguments give equal weights, whatever was drawn before.

    Args:
        spec: architecture and its kwargs.
        num_classes: outputs.
        channels: of the images.
        seed: of the initial weights.

    Raises:
        UserError: unknown architecture, kwargs that it does not take, or a factory that fails.
    """
    check_arch(spec.arch)
    source, name = split_arch(spec.arch)
    kwargs: dict[str, Any] = {"num_classes": num_classes, **spec.kwargs}
    factory: Callable[..., Any]
    if source == "builtin":
        factory, kwargs = NETWORKS[name], {"in_chans": channels, **kwargs}
    elif source == "timm":
        factory, kwargs = _timm(name), {"in_chans": channels, **kwargs}
    elif source == "torchvision":
        if channels != 3:
            raise UserError(f"arch: {spec.arch!r} takes colour images only, the data have {channels} channel; use timm")
        factory = _torchvision(name)
    else:
        factory = _user(spec.arch, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = factory(**kwargs)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"arch: {spec.arch!r} could not be built with {_arguments(kwargs)} ({first_line(error)}); "
                "correct its kwargs"
            ) from None
    if not isinstance(network, nn.Module):
        raise UserError(f"arch: {spec.arch!r} returned a {type(network).__name__}, not a torch.nn.Module")
    return network


def bn_layers(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Its BatchNorm2d layers (timm's BatchNormAct2d is one) in ``modules()`` order.

    Layers without running statistics have nothing to match and are left out.
    """
    found = (m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    return [layer for layer in found if layer.running_mean is not None]


def memory_format(network: nn.Module) -> torch.memory_format:
    """Layout in which a network and its images are fastest, on CPUs as on GPUs: channels last.

    Not so for a strided 1×1 convolution of fewer than 8 channels: oneDNN (CPU, torch 2.15) writes past its buffers
    in the backward pass of one that is laid out channels last.
    """
    for layer in network.modules():
        match layer:
            case nn.Conv2d(kernel_size=(1, 1), stride=stride, in_channels=inputs) if max(stride) > 1 and inputs < 8:
                return torch.contiguous_format
    return torch.channels_last


def _timm(name: str) -> Callable[..., nn.Module]:
    import timm

    return lambda **kwargs: timm.create_model(name, pretrained=False, **kwargs)


def _torchvision(name: str) -> Callable[..., nn.Module]:
    import torchvision

    return lambda **kwargs: torchvision.models.get_model(name, weights=None, **kwargs)


def _split_user(arch: str, name: str) -> tuple[str, str]:
    where, _, function = name.rpartition(":")
    if not where or not function:
        raise UserError(f"arch: {arch!r} is not user:package.module:factory or user:path/file.py:factory")
    return where, function


def _user(arch: str, name: str) -> Callable[..., Any]:
    where, function = _split_user(arch, name)
    try:
        module = _module_of_file(Path(where).expanduser()) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:
        raise UserError(
            f"arch: {arch!r}: {where} could not be imported ({first_line(error)}); "
            "it must be importable on every machine"
        ) from None
    factory = getattr(module, function, None)
    if not callable(factory):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UserError(f"arch: {arch!r}: {where} has no function {function!r}{_nearest(function, names)}")
    return factory


def _module_of_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, so that two files called networks.py do not collide."""
    path = path.resolve()
    name = f"prism_user_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _check_name(arch: str, name: str, valid: Iterable[str]) -> None:
    names = list(valid)
    if name not in names:
        raise UserError(f"arch: {arch!r}: there is no {arch.partition(':')[0]} network {name!r}{_nearest(name, names)}")


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5)
    return f"; the nearest are {', '.join(close)}" if close else f"; there are {', '.join(sorted(names)[:12])}"


def _arguments(kwargs: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
