"""Names of architectures. Of a user's own, where the code lies says nothing about a result; what it holds does."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from cluster import storage
from cluster.errors import UserError

SOURCES = ("builtin", "timm", "torchvision", "user")


def split_arch(arch: str) -> tuple[str, str]:
    """``source:name`` → (source, name).

    Raises:
        UserError: no such source.
    """
    source, _, name = arch.partition(":")
    if source not in SOURCES or not name:
        raise UserError(
            f"arch: {arch!r} is not SOURCE:NAME with SOURCE one of {', '.join(SOURCES)} "
            "(builtin:resnet18, timm:resnet18, torchvision:resnet18, user:package.module:factory)"
        )
    return source, name


def absolute_arch(arch: str) -> str:
    """An architecture's name with the full path of a user's file."""
    where, _, factory = arch.removeprefix("user:").rpartition(":")
    return f"user:{storage.absolute(where)}:{factory}" if arch.startswith("user:") and where.endswith(".py") else arch


def portable_arch(arch: str) -> str:
    """An architecture's name without the folder of a user's file."""
    return "user:" + arch.removeprefix("user:").rpartition("/")[2] if arch.startswith("user:") else arch


def code_sha256(arch: str) -> str | None:
    """Digest of the file with a user's factory; None for libraries' architectures, whose names say what they are.

    Raises:
        UserError: the file or module is not readable.
    """
    source, name = split_arch(arch)
    if source != "user":
        return None
    where = name.rpartition(":")[0]
    try:
        found = where if where.endswith(".py") else getattr(importlib.util.find_spec(where), "origin", None)
        return hashlib.sha256(Path(found or "").expanduser().read_bytes()).hexdigest()
    except (OSError, ImportError, ValueError):
        raise UserError(f"arch: {arch!r}: {where} is not a readable Python file or module; correct the name") from None
