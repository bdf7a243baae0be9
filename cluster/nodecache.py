"""Files that a node fetches or makes once, however many of its processes read them.

The cache is a folder of the node, ``$PRISM_CACHE`` or ``prism-cache-UID`` in the temporary folder. An entry's name is
a hash of what the file is, so a file that changes at its source is another entry. One process at a time, under a file
lock, makes an entry, in a temporary file that is renamed when it is whole. The entries used longest ago make room for
new ones. Nothing depends on the cache: where it cannot be used (disk full, no rights, a lock that never comes free),
files are read where they are.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from cluster import storage
from cluster.errors import UserError

log = logging.getLogger("prism")

# Of the disk that holds the cache: what is free and what the cache has already.
SHARE = 0.5
# So that hundreds of nodes that start together do not ask for the same object in the same moment.
JITTER_S = 1.0
# An entry handed out so recently may not be open yet.
GRACE_S = 60.0
# Longer than any fetch or decoding should take; then a process helps itself.
LOCK_TIMEOUT_S = 1800.0
KEY_LENGTH = 32

Reserve = Callable[[int], None]
"""Told how many bytes a file will have; raises OSError where there is no room for them."""


class NodeCache:
    """A folder of files that are fetched or made once.

    Args:
        folder: created with mode 0700; one that others may write to is not used.
        limit: bytes of all entries. None: ``SHARE`` of the disk.
        sleep: waits some seconds before a fetch.
    """

    def __init__(self, folder: Path, limit: int | None = None, sleep: Callable[[float], object] = time.sleep):
        self.folder, self._limit, self._sleep = folder, limit, sleep

    def local(self, uri: str, *, sha256: str | None = None, version: str | None = None) -> str:
        """Where to read a file: local ones where they are, others from the cache, which fetches them once.

        Args:
            uri: of the file.
            sha256: of its content, where known.
            version: what else tells its content from a later one. None: asked of the storage, one request.

        Returns:
            A local path; ``uri`` itself where the cache cannot hold the file.

        Raises:
            UserError: the content is not that of ``sha256``.
            FileNotFoundError: there is no such file.
        """
        if storage.is_local(uri):
            return uri
        known = [sha256] if sha256 else [uri, version or file_version(uri)]

        def fetch(path: Path, reserve: Reserve) -> None:
            self._sleep(random.SystemRandom().uniform(0, JITTER_S))
            size = storage.file_size(uri)
            reserve(size)
            # Twice, because what breaks a body on its way rarely does so again.
            for _ in range(2):
                storage.download(uri, path, size)
                if sha256 in (None, _sha256(path)):
                    return
            raise UserError(f"{uri}: damaged, for its sha256 is not the recorded {sha256}; restore or remake the file")

        found = self._entry(_key(["file", *known]), fetch, _sha256)
        return uri if found is None else str(found)

    def make(self, what: Any, fill: Callable[[Path, Reserve], None]) -> Path | None:
        """The file that ``fill`` writes, called where the node does not have it yet.

        Args:
            what: plain values that determine the content.
            fill: writes a path, and first reserves what it will take.

        Returns:
            None where the cache cannot hold it.
        """
        return self._entry(_key(["made", what]), fill, lambda path: str(path.stat().st_size))

    def room(self) -> int:
        """Bytes that all entries together may have, the present ones included; 0 where there is no cache."""
        held = 0
        try:
            self._prepare()
            for path in self.folder.iterdir():
                # Others may drop it meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    held += path.lstat().st_size
            return self._room(held)
        except OSError:
            return 0

    def _room(self, held: int) -> int:
        free = shutil.disk_usage(self.folder).free
        return int(SHARE * (free + held)) if self._limit is None else self._limit

    def _entry(self, key: str, fill: Callable[[Path, Reserve], None], check: Callable[[Path], str]) -> Path | None:
        """The file ``KEY-CHECK``, where ``check`` gives CHECK again, or made anew."""
        try:
            self._prepare()
            with FileLock(self.folder / f"{key}.lock", timeout=LOCK_TIMEOUT_S, mode=0o600):
                return self._find(key, check) or self._add(key, fill, check)
        except OSError as error:
            # What is wrong at the source will be said by those who then read it there.
            log.info("node cache %s: %s", self.folder, error)
            return None

    def _prepare(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(errno.EACCES, "not a folder that its user alone can write", str(self.folder))

    def _find(self, key: str, check: Callable[[Path], str]) -> Path | None:
        for path in self.folder.glob(f"{key}-*"):
            found = path.lstat()
            mine = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
            if mine and check(path) == path.name.removeprefix(f"{key}-"):
                os.utime(path)
                return path
            path.unlink()
        return None

    def _add(self, key: str, fill: Callable[[Path, Reserve], None], check: Callable[[Path], str]) -> Path:
        # The lock makes the name this process's own; what a killed one left is overwritten.
        temporary = self.folder / f"{key}.tmp"
        try:
            fill(temporary, lambda size: self._reserve(temporary, size))
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            target = self.folder / f"{key}-{check(temporary)}"
            temporary.chmod(0o400)
            temporary.replace(target)
            return target
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, size: int) -> None:
        """Drop what was used longest ago until ``size`` bytes fit.

        Raises:
            OSError: they cannot.
        """
        held: list[tuple[float, int, Path]] = []
        own = 0
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found = path.lstat()
                if path == temporary:
                    own = found.st_blocks * 512
                elif path.suffix != ".lock":
                    held.append((found.st_mtime, found.st_size, path))
        total = sum(taken for _, taken, _ in held)
        limit = self._room(total + own)
        for used, taken, path in sorted(held):
            if total + size <= limit:
                return
            if time.time() - used > GRACE_S and self._drop(path):
                total -= taken
        if total + size > limit:
            raise OSError(errno.ENOSPC, f"no room for {size} bytes", str(self.folder))

    def _drop(self, path: Path) -> bool:
        """Remove an entry, or what a killed process left of one, unless its lock is held."""
        key = path.name[:KEY_LENGTH]
        try:
            with FileLock(self.folder / f"{key}.lock", timeout=0, mode=0o600):
                path.unlink(missing_ok=True)
        except OSError:
            return False
        return True


def node_cache() -> NodeCache:
    """The node's cache."""
    named = os.environ.get("PRISM_CACHE")
    return NodeCache(Path(named) if named else Path(tempfile.gettempdir()) / f"prism-cache-{os.geteuid()}")


def file_version(uri: str) -> str:
    """What the storage says of a file that changes with its content: size, time, tag or inode.

    Raises:
        FileNotFoundError: there is no such file.
    """
    fs, path = storage.resolve(uri)
    return entry_version(fs.info(path))


def entry_version(info: dict[str, Any]) -> str:
    """``file_version`` of an entry of a listing."""
    told = ("size", "ETag", "etag", "LastModified", "updated", "mtime", "created", "ino")
    return json.dumps({key: str(info[key]) for key in told if key in info})


def _key(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
