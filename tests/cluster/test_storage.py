"""Paths, listings and atomic writes, on the local disk and on an S3 server."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from s3.stores import STORES

from cluster import storage
from cluster.errors import UserError


@pytest.fixture(params=["local", *STORES])
def root(request, tmp_path, open_store) -> str:
    return str(tmp_path / "store") if request.param == "local" else f"{open_store(request.param)}/store"


def test_write_read_list_remove(root):
    storage.write_bytes(storage.join(root, "a", "two.bin"), b"22")
    storage.write_bytes(storage.join(root, "a", "one.bin"), b"1")
    storage.write_json(storage.join(root, "a", "x.json"), {"b": [1, 2], "a": None})
    storage.write_bytes(storage.join(root, "a", "deeper", "three.bin"), b"333")

    assert storage.read_bytes(storage.join(root, "a", "one.bin")) == b"1"
    assert storage.read_json(storage.join(root, "a", "x.json")) == {"a": None, "b": [1, 2]}
    assert list(storage.list_files(storage.join(root, "a")).items())[:2] == [("one.bin", 1), ("two.bin", 2)]
    assert list(storage.list_files(storage.join(root, "a"), ".json")) == ["x.json"]
    assert storage.list_files(storage.join(root, "missing")) == {}
    assert storage.exists(storage.join(root, "a"))
    storage.remove(storage.join(root, "a"))
    storage.remove(storage.join(root, "a"))
    assert not storage.exists(storage.join(root, "a", "deeper", "three.bin"))


def test_overwriting_replaces_the_content(root):
    uri = storage.join(root, "file")
    storage.write_bytes(uri, b"a long first content")
    storage.write_bytes(uri, b"short")
    assert storage.read_bytes(uri) == b"short"
    assert list(storage.list_files(root)) == ["file"]


def test_check_writable_leaves_nothing_behind(root):
    storage.check_writable(root, "out")
    assert not storage.exists(root)
    storage.write_bytes(storage.join(root, "f"), b"")
    storage.check_writable(root, "out")
    assert list(storage.list_files(root)) == ["f"]


def test_folder_below_a_file_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^out: .*is not writable"):
        storage.check_writable(str(tmp_path / "file"), "out")
    with pytest.raises(UserError, match=r"^out: .*is not writable"):
        storage.check_writable(str(tmp_path / "file" / "below"), "out")


@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, where):
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if where == "write":
        real = Path.open

        def broken(self, mode="r", *args, **kwargs):
            handle = real(self, mode, *args, **kwargs)
            handle.write(b"half")
            handle.close()
            full()

        monkeypatch.setattr(Path, "open", broken)
    elif where == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_bytes(uri, b"new content")
    monkeypatch.undo()
    assert storage.read_bytes(uri) == b"old"
    assert os.listdir(tmp_path) == ["file"], "the temporary file must be gone"


def test_readers_never_see_a_part(tmp_path):
    uri = str(tmp_path / "file")
    contents = [bytes([n]) * 300_000 for n in range(4)]
    storage.write_bytes(uri, contents[0])
    stop = threading.Event()

    def write():
        n = 0
        while not stop.is_set():
            n += 1
            storage.write_bytes(uri, contents[n % 4])

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert all(storage.read_bytes(uri) in contents for _ in range(200))
    finally:
        stop.set()
        thread.join()


def test_listing_hides_unfinished_files(tmp_path):
    (tmp_path / ".tmp-123-part.parquet").write_bytes(b"half")
    (tmp_path / "part.parquet").write_bytes(b"whole")
    assert storage.list_files(str(tmp_path), ".parquet") == {"part.parquet": 5}


def test_unknown_scheme_names_the_remedy():
    with pytest.raises(UserError, match="use a local path or s3://"):
        storage.resolve("nonsense://bucket/x")


def test_file_scheme_and_home_are_local(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_bytes("~/x", b"1")
    assert storage.read_bytes(f"file://{tmp_path}/x") == b"1"
    assert storage.is_local(str(tmp_path))
    assert not storage.is_local("s3://bucket/x")


def test_equal_values_are_equal_json_bytes(tmp_path):
    storage.write_json(str(tmp_path / "a"), {"x": 1, "y": 2})
    storage.write_json(str(tmp_path / "b"), {"y": 2, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path):
    free = storage.free_bytes(str(tmp_path / "not" / "yet"))
    assert free is not None
    assert free > 0
