"""Weights files: reading without unpickling, foreign names, writing."""

from __future__ import annotations

import contextlib
import io
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cluster import storage
from cluster.errors import PrismError, UserError, first_line, some
from cluster.nodecache import node_cache
from stages.teachers.options import KeyMap

# What torch.save writes: a zip archive, before torch 1.6 a bare pickle.
_TORCH_MAGIC = (b"PK\x03\x04", b"\x80\x02")


def read_weights_bytes(uri: str) -> bytes:
    """A weights file as it stands.

    Raises:
        UserError: it is missing or cannot be read.
    """
    with _readable(uri):
        return storage.read_bytes(uri)


@contextlib.contextmanager
def _readable(uri: str) -> Iterator[None]:
    """Say in a sentence why a file cannot be read."""
    try:
        yield
    except PrismError:
        raise
    except FileNotFoundError:
        raise UserError(f"{uri}: there is no such weights file; correct the path or download the file first") from None
    except Exception as error:
        raise UserError(
            f"{uri}: the weights file cannot be read ({str(error) or type(error).__name__}); "
            "check the path and its rights"
        ) from None


def load_state(uri: str, *, sha256: str | None = None, version: str | None = None) -> dict[str, Any]:
    """Top level of a safetensors or torch file, local or ``s3://``, on the CPU; nothing is ever unpickled.

    A local file is mapped, not copied: tensors are to be copied to where they are used. One on an object store is
    fetched once per node (``cluster.nodecache``).

    Args:
        uri: of the file.
        sha256: of its content, where known; checked when it is fetched.
        version: what else tells its content from an earlier one's, where known.

    Raises:
        UserError: missing, no weights file, one that needs unpickling, or fetched with another sha256.
    """
    with _readable(uri):
        local = node_cache().local(uri, sha256=sha256, version=version)
        path = storage.resolve(local)[1] if storage.is_local(local) else None
        if path is not None:
            with open(path, "rb") as file:
                start = file.read(4)
            source: str | bytes = path
        else:
            source = storage.read_bytes(uri)
            start = source[:4]
    return _parse(source, start, uri)


def _parse(source: str | bytes, start: bytes, what: str) -> dict[str, Any]:
    """``load_state`` of a local path, or of bytes, that start with ``start``; ``what`` names them in errors."""
    if not start.startswith(_TORCH_MAGIC):
        try:
            load = safetensors.torch.load_file if isinstance(source, str) else safetensors.torch.load
            return dict(load(source))  # type: ignore[arg-type]
        except SafetensorError as error:
            raise UserError(
                f"{what}: neither a safetensors nor a torch weights file ({error}); "
                "save the network's state_dict with safetensors.torch.save_file"
            ) from None
    try:
        # Only archives can be mapped.
        mapped = isinstance(source, str) and start.startswith(b"PK")
        file = source if isinstance(source, str) else io.BytesIO(source)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise UserError(
            f"{what}: reading this file needs unpickling, which can run foreign code, and is refused; load it where "
            "you trust it and save the network's state_dict again with safetensors.torch.save_file"
        ) from None
    except Exception as error:
        raise UserError(f"{what}: damaged torch file ({first_line(error)}); copy or download it again") from None
    if not isinstance(state, dict):
        raise UserError(f"{what}: holds a {type(state).__name__}, not a state dict; save model.state_dict()")
    return state


def apply_weights(model: nn.Module, state: Mapping[str, Any], key_map: KeyMap, what: str) -> None:
    """Load a state dict into a network, names mapped by ``key_map``; every tensor must find its place.

    Args:
        model: changed in place.
        state: top level of the weights file.
        key_map: how its names become the network's.
        what: names the teacher or file in errors.

    Raises:
        UserError: missing or unexpected names, shapes that differ, or a ``key_map`` that does not fit.
    """
    tensors = _map_names(_select(state, key_map, what), key_map, what)
    expected = model.state_dict()
    missing = [k for k in expected if k not in tensors and not _matches(k, key_map.ignore_missing)]
    unexpected = [k for k in tensors if k not in expected]
    shapes = [
        f"{k} {list(tensors[k].shape)} instead of {list(expected[k].shape)}"
        for k in expected
        if k in tensors and tensors[k].shape != expected[k].shape
    ]
    problems = [
        f"{len(found)} {kind} ({some(found)})"
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise UserError(
            f"{what}: the weights do not fit the architecture: {', '.join(problems)}; map or ignore names with "
            "key_map, or correct arch, kwargs and num_outputs"
        )
    model.load_state_dict(tensors, strict=False)


def _select(state: Mapping[str, Any], key_map: KeyMap, what: str) -> Mapping[str, Any]:
    """The state dict inside the file."""
    if key_map.state_key is not None:
        if not isinstance(state.get(key_map.state_key), Mapping):
            raise UserError(
                f"{what}: key_map.state_key = {key_map.state_key!r} is no state dict of the file, which holds "
                f"{some(list(state))}"
            )
        return state[key_map.state_key]
    nested = [k for k, v in state.items() if isinstance(v, Mapping)]
    if nested:
        raise UserError(f"{what}: the file holds {some(nested)}, not tensors alone; name one with key_map.state_key")
    return state


def _map_names(state: Mapping[str, Any], key_map: KeyMap, what: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for original, value in state.items():
        if _matches(original, key_map.ignore_unexpected):
            continue
        name = original.removeprefix(key_map.strip_prefix)
        for pattern, replacement in key_map.rename:
            try:
                name = re.sub(pattern, replacement, name)
            except (re.error, IndexError) as error:
                raise UserError(f"{what}: key_map.rename: {pattern!r} → {replacement!r} is invalid ({error})") from None
        if not isinstance(value, Tensor):
            raise UserError(
                f"{what}: {original} is a {type(value).__name__}, not a tensor; drop it with key_map.ignore_unexpected"
            )
        if name in out:
            raise UserError(f"{what}: key_map gives two names of the file the same new name {name}; correct its rename")
        out[name] = value
    return out


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def save_weights(uri: str, state: Mapping[str, Tensor]) -> bytes:
    """Commit a state dict as safetensors in one step; equal tensors give equal bytes.

    Returns:
        The file's content.
    """
    content = safetensors.torch.save({k: v.detach().cpu().clone().contiguous() for k, v in state.items()})
    storage.write_bytes(uri, content)
    return content
