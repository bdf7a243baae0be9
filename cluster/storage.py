"""URIs to file systems, and writing a file in one atomic step.

A run directory, a dataset and a weights file may each be a local path or ``s3://bucket/key``. Everything goes
through fsspec, so credentials come from the requester's usual chain and never from the configuration.
"""

from __future__ import annotations

import json
import os
import posixpath
import shutil
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cluster.errors import UserError


def is_local(uri: str) -> bool:
    """Whether ``uri`` is a plain path or ``file://``."""
    return urlsplit(uri).scheme in ("", "file")


def absolute(uri: str) -> str:
    """The same place for every process, whatever its working directory."""
    return resolve(uri)[1] if is_local(uri) else uri


def resolve(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path of a URI.

    Raises:
        UserError: the URI's scheme is unknown.
    """
    if is_local(uri):
        return LocalFileSystem(), str(Path(uri.removeprefix("file://")).expanduser().absolute())
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise UserError(f"{uri}: {error}; use a local path or s3://bucket/key") from None
    return fs, path


def join(uri: str, *parts: str) -> str:
    """``uri`` extended by path parts."""
    return posixpath.join(uri.rstrip("/") if uri != "/" else uri, *parts)


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = resolve(uri)
    fs.invalidate_cache()
    return bool(fs.exists(path))


def list_files(uri: str, suffix: str = "") -> dict[str, int]:
    """Names (relative to ``uri``, one level) to sizes in bytes, sorted; temporary files are left out.

    One listing, whatever the number of files. A missing folder is an empty one.
    """
    fs, path = resolve(uri)
    fs.invalidate_cache()
    try:
        entries = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    files = {posixpath.basename(e["name"]): int(e["size"] or 0) for e in entries if e["type"] == "file"}
    return {n: files[n] for n in sorted(files) if n.endswith(suffix) and not n.startswith(".tmp-")}


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    fs, path = resolve(uri)
    data: bytes = fs.cat_file(path)
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file in one step: a reader sees the old content, the new one or nothing, never a part.

    Locally: a temporary name beside it, fsync, rename. On an object store: a single put.
    """
    fs, path = resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex}-{target.name}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(uri: str) -> Any:
    """Parse a JSON file."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Write JSON in one step (sorted keys, so equal values are equal bytes)."""
    write_bytes(uri, (json.dumps(value, indent=1, sort_keys=True, allow_nan=True) + "\n").encode())


def remove(uri: str) -> None:
    """Delete a file or a folder with all it holds; a missing one is fine."""
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        shutil.rmtree(path, ignore_errors=True) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
    elif fs.exists(path):
        fs.rm(path, recursive=True)


def check_writable(uri: str, field: str) -> None:
    """Prove that files can be created under ``uri``, leaving nothing behind.

    Raises:
        UserError: names ``field`` and the reason.
    """
    fs, path = resolve(uri)
    try:
        if isinstance(fs, LocalFileSystem):
            folder = Path(path)
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError("a file stands there")
            while not folder.exists():
                folder = folder.parent
            probe = folder / f".tmp-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        else:
            probe_path = posixpath.join(path, f".tmp-{uuid.uuid4().hex}")
            fs.pipe_file(probe_path, b"")
            fs.rm_file(probe_path)
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{field}: {uri} is not writable ({reason}); choose another place or fix its rights") from None


def free_bytes(uri: str) -> int | None:
    """Free bytes of the disk that holds a local ``uri``; None for an object store."""
    fs, path = resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        return None
    folder = Path(path)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
