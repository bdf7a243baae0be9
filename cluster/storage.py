"""URIs to file systems, and writing a file in one atomic step.

A run directory, a dataset and a weights file may each be a local path or ``s3://bucket/key``. Everything goes
through fsspec, so credentials come from the requester's usual chain and never from the configuration. What passes
by itself in an object store is waited for in ``cluster.objectstore``, below whoever opens a file.
"""

from __future__ import annotations

import json
import os
import posixpath
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cluster.errors import PrismError, UserError, first_line
from cluster.objectstore import ObjectStore

S3 = ("s3", "s3a")
# Of a file on its way to the disk, in memory at a time.
PIECE_BYTES = 128 * 2**20


def is_local(uri: str) -> bool:
    """Whether ``uri`` is a plain path or ``file://``."""
    return urlsplit(uri).scheme in ("", "file")


def absolute(uri: str) -> str:
    """The same place for every process, whatever its working directory.

    Raises:
        UserError: the URI carries credentials.
    """
    if is_local(uri):
        return resolve(uri)[1]
    _refuse_credentials(uri)
    return uri


def _refuse_credentials(uri: str) -> None:
    """Addresses are written down, in ``run.yaml`` and in sentences, and what they carry with them."""
    scheme, _, rest = uri.partition("://")
    host = rest.partition("/")[0]
    # A secret may have a slash in it, and what stands before that looks like a host with a port; buckets have none.
    if "@" in host or (scheme in S3 and ":" in host and not host.startswith("arn:")):
        shown = f"{scheme}://***@{rest.rpartition('@')[2]}" if "@" in rest else f"{scheme}://***"
    elif "?" in rest:
        shown = uri
    else:
        return
    raise UserError(
        f"{shown.partition('?')[0]}: this address carries credentials or a query, and addresses are written into "
        f"files; give {scheme}://bucket/key alone, and the credentials by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "AWS_PROFILE or the role of the machine"
    )


def resolve(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path of a URI.

    Raises:
        UserError: the URI's scheme is unknown, or it carries credentials.
    """
    if is_local(uri):
        return LocalFileSystem(), str(Path(uri.removeprefix("file://")).expanduser().absolute())
    _refuse_credentials(uri)
    if urlsplit(uri).scheme in S3:
        return ObjectStore(), ObjectStore._strip_protocol(uri)
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
    return bool(fs.exists(path))


def list_files(uri: str, suffix: str = "") -> dict[str, int]:
    """Names (relative to ``uri``, one level) to sizes in bytes, sorted; temporary files are left out.

    One listing, a request for every 1,000 files. A missing folder is an empty one.
    """
    return {name: int(entry["size"] or 0) for name, entry in list_entries(uri, suffix).items()}


def list_entries(uri: str, suffix: str = "") -> dict[str, dict[str, Any]]:
    """``list_files`` with all that the file system says of each file (size, time, tag, as it calls them)."""
    fs, path = resolve(uri)
    try:
        entries = fs.list_folder(path) if isinstance(fs, ObjectStore) else fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    files = {posixpath.basename(e["name"]): e for e in entries if e["type"] == "file"}
    # The console of an object store leaves an object without a name where somebody made a folder.
    return {n: files[n] for n in sorted(files) if n and n.endswith(suffix) and not n.startswith(".tmp-")}


def size(uri: str) -> int:
    """Bytes of a file."""
    fs, path = resolve(uri)
    fs.invalidate_cache()
    return int(fs.size(path))


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    fs, path = resolve(uri)
    data: bytes = fs.cat_file(path)
    return data


def file_size(uri: str) -> int:
    """Bytes of a file."""
    fs, path = resolve(uri)
    return int(fs.size(path))


def download(uri: str, target: Path, size: int) -> None:
    """Copy a file of ``size`` bytes to a local path: one request, or one after the other for ``PIECE_BYTES`` each."""
    fs, path = resolve(uri)
    with target.open("wb") as file:
        for start in range(0, size, PIECE_BYTES):
            file.write(fs.cat_file(path, start=start, end=min(size, start + PIECE_BYTES)))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file in one step: a reader sees the old content, the new one or nothing, never a part.

    Locally: a temporary name beside it, fsync, rename. On an object store: a single put, of large files in parts that
    become an object when the last has arrived.
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
    elif isinstance(fs, ObjectStore):
        fs.remove(path)
    elif fs.exists(path):
        fs.rm(path, recursive=True)


def remove_files(uri: str, names: Sequence[str]) -> None:
    """Delete files of a folder by name, many with one request where the store can; missing ones are fine."""
    if not names:
        return
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        for name in names:
            Path(path, name).unlink(missing_ok=True)
    else:
        fs.rm([posixpath.join(path, name) for name in names])


def check_writable(uri: str, field: str) -> None:
    """Prove that files can be created under ``uri``, leaving nothing behind.

    Raises:
        UserError: names ``field`` and the reason.
    """
    fs, path = resolve(uri)
    name = f".tmp-{uuid.uuid4().hex}"
    try:
        if isinstance(fs, LocalFileSystem):
            folder = Path(path)
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError("a file stands there")
            while not folder.exists():
                folder = folder.parent
            probe = folder / name
            probe.touch()
            probe.unlink()
        else:
            probe_path = posixpath.join(path, name)
            fs.pipe_file(probe_path, b"")
            fs.rm_file(probe_path)
    except PrismError as error:
        raise type(error)(f"{field}: {str(error).replace(f'/{name}', '')}") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or first_line(error)
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
