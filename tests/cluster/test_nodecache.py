"""The node's cache: one fetch for many readers, and never in anyone's way."""

from __future__ import annotations

import errno
import hashlib
import logging
import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from cluster import nodecache, storage
from cluster.errors import UserError
from cluster.nodecache import NodeCache, node_cache

CONTENT = random.Random(0).randbytes(100_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each URI was downloaded."""
    count: Counter[str] = Counter()
    real = storage.download

    def counting(uri: str, target: Path, size: int) -> None:
        count[uri] += 1
        time.sleep(0.05)
        real(uri, target, size)

    monkeypatch.setattr(storage, "download", counting)
    return count


@pytest.fixture
def uri() -> Iterator[str]:
    """A file that is not local."""
    storage.write_bytes("memory://bucket/file", CONTENT)
    yield "memory://bucket/file"
    fsspec.filesystem("memory").store.clear()


def cache(tmp_path: Path, limit: int | None = None) -> NodeCache:
    return NodeCache(tmp_path / "cache", limit, sleep=lambda seconds: None)


def entries(tmp_path: Path) -> list[Path]:
    return sorted(p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock")


def test_local_files_are_read_where_they_are(tmp_path, fetches):
    (tmp_path / "file").write_bytes(CONTENT)
    assert cache(tmp_path).local(str(tmp_path / "file")) == str(tmp_path / "file")
    assert not fetches
    assert not (tmp_path / "cache").exists()


def test_many_readers_fetch_once(tmp_path, uri, fetches):
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: cache(tmp_path).local(uri), range(16)))
    assert fetches == {uri: 1}
    (path,) = map(Path, found)
    assert path.read_bytes() == CONTENT
    assert entries(tmp_path) == [path]
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o400


@pytest.mark.s3
def test_processes_of_a_node_make_one_request(tmp_path, s3_server, caplog, monkeypatch):
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path / "cache"))
    where = f"{s3_server}/nodecache/{tmp_path.name}"
    storage.write_bytes(where, CONTENT)
    with (
        caplog.at_level(logging.INFO, "werkzeug"),
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool,
    ):
        found = {future.result() for future in [pool.submit(node_cache().local, where, sha256=SHA) for _ in range(4)]}
    assert [Path(path).read_bytes() for path in found] == [CONTENT]
    assert sum(f"GET /prism-tests/nodecache/{tmp_path.name}" in r.getMessage() for r in caplog.records) == 1


def test_large_files_come_in_pieces(tmp_path, uri, monkeypatch):
    monkeypatch.setattr(storage, "PIECE_BYTES", 30_000)
    assert Path(cache(tmp_path).local(uri)).read_bytes() == CONTENT


def test_a_file_that_changed_is_fetched_again(tmp_path, uri, fetches):
    first = cache(tmp_path).local(uri)
    time.sleep(0.01)
    storage.write_bytes(uri, CONTENT[::-1])
    second = cache(tmp_path).local(uri)
    assert first != second
    assert Path(second).read_bytes() == CONTENT[::-1]
    assert Path(first).read_bytes() == CONTENT


def test_equal_content_of_several_places_is_fetched_once(tmp_path, uri, fetches):
    storage.write_bytes("memory://bucket/copy", CONTENT)
    assert cache(tmp_path).local(uri, sha256=SHA) == cache(tmp_path).local("memory://bucket/copy", sha256=SHA)
    assert fetches.total() == 1


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "link"])
def test_damaged_and_foreign_entries_are_fetched_again(tmp_path, uri, fetches, damage):
    path = Path(cache(tmp_path).local(uri))
    path.chmod(0o600)
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(CONTENT)
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
    else:
        wrong = {"flipped": CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]), "cut": CONTENT[:-1], "empty": b""}
        path.write_bytes(wrong[damage])
    again = Path(cache(tmp_path).local(uri))
    assert again.read_bytes() == CONTENT
    assert not again.is_symlink()
    assert fetches[uri] == 2


def test_a_body_broken_on_its_way_is_fetched_again_and_one_broken_at_its_source_is_said(tmp_path, uri, monkeypatch):
    real, calls = storage.download, []

    def breaking(source: str, target: Path, size: int) -> None:
        calls.append(source)
        real(source, target, size)
        if len(calls) == 1:
            target.write_bytes(CONTENT[:10])

    monkeypatch.setattr(storage, "download", breaking)
    assert Path(cache(tmp_path).local(uri, sha256=SHA)).read_bytes() == CONTENT
    assert len(calls) == 2
    with pytest.raises(UserError, match=r"memory://bucket/file: damaged, for its sha256.*restore"):
        cache(tmp_path).local(uri, sha256="0" * 64)
    assert len(entries(tmp_path)) == 1


def aged(path: str | Path, seconds: float) -> Path:
    os.utime(path, (time.time() - seconds,) * 2)
    return Path(path)


def test_least_recently_used_make_room(tmp_path, fetches):
    small = cache(tmp_path, limit=250_000)
    paths = {}
    for index in range(2):
        storage.write_bytes(f"memory://bucket/{index}", CONTENT + bytes([index]))
        paths[index] = aged(small.local(f"memory://bucket/{index}"), 1000 - index)
    # Used again, so the other one is the oldest.
    aged(small.local("memory://bucket/0"), 500)
    storage.write_bytes("memory://bucket/2", CONTENT)
    third = Path(small.local("memory://bucket/2"))
    assert set(entries(tmp_path)) == {paths[0], third}
    # What was handed out a moment ago may not be open yet: the newcomer is read where it is.
    os.utime(paths[0])
    storage.write_bytes("memory://bucket/3", CONTENT)
    assert small.local("memory://bucket/3") == "memory://bucket/3"
    assert set(entries(tmp_path)) == {paths[0], third}


def test_remains_of_killed_processes_make_room_too(tmp_path, uri):
    small = cache(tmp_path, limit=150_000)
    (tmp_path / "cache").mkdir(mode=0o700)
    remains = tmp_path / "cache" / f"{'a' * nodecache.KEY_LENGTH}.tmp"
    remains.write_bytes(bytes(100_000))
    aged(remains, 1000)
    assert small.local(uri) != uri
    assert not remains.exists()


def test_full_disk_means_reading_in_place(tmp_path, uri, monkeypatch):
    def full(source: str, target: Path, size: int) -> None:
        target.write_bytes(CONTENT[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "download", full)
    assert cache(tmp_path).local(uri) == uri
    assert cache(tmp_path).make("x", lambda path, reserve: full("", path, 0)) is None
    assert entries(tmp_path) == []


def test_places_that_others_may_write_to_are_not_used(tmp_path, uri):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert cache(tmp_path).local(uri) == uri
    (tmp_path / "cache").rmdir()
    (tmp_path / "other").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "other")
    assert cache(tmp_path).local(uri) == uri
    (tmp_path / "cache").unlink()
    (tmp_path / "cache").write_bytes(b"")
    assert cache(tmp_path).local(uri) == uri


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        cache(tmp_path).local("memory://bucket/none")


def test_made_files_are_made_once_and_again_when_cut(tmp_path):
    calls = []

    def fill(path: Path, reserve: nodecache.Reserve) -> None:
        calls.append(path)
        reserve(len(CONTENT))
        path.write_bytes(CONTENT)

    first = cache(tmp_path).make(["a", 1], fill)
    assert first is not None
    assert cache(tmp_path).make(["a", 1], fill) == first
    assert cache(tmp_path).make(["a", 2], fill) != first
    assert len(calls) == 2
    first.chmod(0o600)
    first.write_bytes(CONTENT[:-1])
    again = cache(tmp_path).make(["a", 1], fill)
    assert again is not None
    assert again.read_bytes() == CONTENT
    assert len(calls) == 3


def test_only_fetches_wait_a_bounded_moment(tmp_path, uri):
    waited: list[float] = []
    waiting = NodeCache(tmp_path / "cache", sleep=waited.append)
    for _ in range(3):
        waiting.local(uri)
    waiting.make("x", lambda path, reserve: path.write_bytes(b"x") and None)
    assert len(waited) == 1
    assert 0 <= waited[0] <= nodecache.JITTER_S


def test_folder_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path))
    assert node_cache().folder == tmp_path
    monkeypatch.delenv("PRISM_CACHE")
    assert node_cache().folder.name == f"prism-cache-{os.geteuid()}"


def test_room_is_what_all_entries_may_take(tmp_path, monkeypatch):
    one = cache(tmp_path, limit=1000)
    assert one.room() == 1000
    assert one.make("a", lambda path, reserve: (reserve(300), path.write_bytes(bytes(300)))) is not None
    # What is there already may make room.
    assert one.room() == 1000
    free = shutil.disk_usage(tmp_path).free
    assert cache(tmp_path).room() == pytest.approx(free / 2, rel=0.2)
    # A folder that others may write to is not used.
    (tmp_path / "cache").chmod(0o777)
    assert one.room() == 0
