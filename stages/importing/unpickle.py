"""Reading CIFAR's pickles without unpickling: no code of the file, or named by the file, ever runs.

The published batches are protocol 2 pickles of a dict of byte strings, lists and one uint8 array. The only
names that they may mention are those by which numpy arrays and bytes are written, and each of these is
replaced by a stand-in below that merely records what it is given.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from cluster.errors import UserError


class _Dtype:
    """Stand-in for ``numpy.dtype``: one-byte unsigned integers are all that images consist of."""

    def __init__(self, code: str | bytes, *_: Any):
        name = code.decode("latin1") if isinstance(code, bytes) else code
        if name not in ("u1", "uint8", "|u1", "B"):
            raise pickle.UnpicklingError(f"an array of type {name!r} is not expected")

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like; there is none for single bytes."""


class _Array:
    """Stand-in for ``numpy.ndarray`` under construction."""

    value: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a type is not expected")
        raw = data.encode("latin1") if isinstance(data, str) else data
        self.value = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, encoding: str | bytes = "latin1", *_: Any) -> bytes:
    """How Python 3 writes bytes at protocol 2: always through latin-1."""
    if encoding not in ("latin1", "latin-1", b"latin1", b"latin-1"):
        raise pickle.UnpicklingError(f"text encoding {encoding!r} is not expected")
    return text.encode("latin1")


def _bytes() -> bytes:
    return b""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _bytes,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside")


def read_batch(data: bytes, what: str) -> dict[str, Any]:
    """The dict of a CIFAR batch or meta file.

    Args:
        data: the file.
        what: the file's name for messages.

    Returns:
        Names to uint8 arrays, and to lists whose byte strings are decoded to text.

    Raises:
        UserError: damaged, or holds anything beyond what such files hold.
    """
    try:
        loaded = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:
        raise UserError(
            f"SRC: {what} is refused: not a CIFAR python batch, or a damaged one ({error}); download it again"
        ) from None
    if not isinstance(loaded, dict):
        raise UserError(f"SRC: {what} is refused: it holds a {type(loaded).__name__} instead of CIFAR's dict")
    return {_text(key): _plain(value) for key, value in loaded.items()}


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.value
    return [_text(item) for item in value] if isinstance(value, list) else _text(value)
