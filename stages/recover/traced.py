"""What a network's trace depends on beside its weights: nobody looks at the network again where a trace was kept."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib
import inspect
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# What every module has is its weights, its parts, or hooks, which are looked at by themselves.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_OWN_HOOKS = "_Tapped."
_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


class Untold(Exception):
    """The trace depends on something that has no text that tells it from others."""


def traced_from(network: nn.Module) -> list[str]:
    """Classes with the files that they come from, attributes that are no weights, and functions among these.

    Raises:
        Untold: an attribute is a lambda, or an object of which nothing is known; or there are hooks.
    """
    out, files = [], set()
    for name, module in network.named_modules():
        kind = type(module)
        files |= {each.__module__ for each in kind.__mro__ if issubclass(each, nn.Module)}
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(not getattr(hook, "__qualname__", "").startswith(_OWN_HOOKS) for hook in hooks):
            raise Untold
        told = {key: _told(value) for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
        out.append(f"{name}: {kind.__module__}.{kind.__qualname__} {sorted(told.items())}")
    return [*out, *sources(files)]


def sources(modules: Iterable[str]) -> list[str]:
    """Digests of the files of Python modules; torch itself is known by its version.

    Raises:
        Untold: there is no such file.
    """
    names = sorted(name for name in set(modules) if name.split(".")[0] != "torch")
    try:
        texts = [inspect.getsource(importlib.import_module(name)) for name in names]
    except (OSError, TypeError, ImportError):
        raise Untold from None
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def _told(value: Any) -> str:
    """Text that tells a value from others."""
    if isinstance(value, types.FunctionType):
        if value.__name__ == "<lambda>":
            raise Untold
        bound = value.__defaults__, value.__kwdefaults__, [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{value.__module__}.{value.__qualname__}{_told(bound)}"
    if isinstance(value, type | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, functools.partial):
        return f"partial({_told(value.func)}, {_told(value.args)}, {_told(value.keywords)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_told(key)}: {_told(each)}" for key, each in value.items()) + "}"
    if isinstance(value, tuple | list | set | frozenset):
        parts = [_told(each) for each in value]
        return f"{type(value).__name__}({', '.join(parts if isinstance(value, tuple | list) else sorted(parts))})"
    if isinstance(value, nn.Module):
        # A part of the network that is not registered as one.
        return str(traced_from(value))
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}{_told(vars(value))}"
    # Text of other objects may leave out what tells them apart.
    if not isinstance(value, _PLAIN):
        raise Untold
    return repr(value)
