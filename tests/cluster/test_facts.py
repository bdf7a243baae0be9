"""What is found out about machines: here by itself, and on every node of a session."""

from __future__ import annotations

import platform
import uuid

import pytest

from cluster import facts, storage
from cluster.checks import CHECKS, check_versions
from cluster.facts import count_gpus, gather, try_place, versions


def test_places(tmp_path):
    (tmp_path / "file").write_text("x")
    assert try_place("read", str(tmp_path / "file")) == ""
    assert try_place("read", str(tmp_path / "none")) == "no such file there"
    assert try_place("write", str(tmp_path / "new" / "folder")) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert "is not writable" in try_place("write", str(tmp_path / "file" / "below"))
    assert try_place("see", str(tmp_path / "file")) == ""
    assert try_place("see", str(tmp_path / "none")) != ""


@pytest.mark.s3
def test_places_on_an_object_store(s3_server):
    root = f"{s3_server}/{uuid.uuid4().hex}"
    storage.write_bytes(f"{root}/file", b"x")
    assert try_place("read", f"{root}/file") == ""
    assert try_place("read", f"{root}/none") == "no such file there"
    assert try_place("write", root) == ""
    assert list(storage.list_files(root)) == ["file"]
    assert "s3://no-such-bucket-here/x" in try_place("write", "s3://no-such-bucket-here/x")


def test_gpus_are_counted_whatever_this_process_sees(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA A10G (UUID: GPU-1)'\necho 'GPU 1: NVIDIA A10G (UUID: GPU-2)'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(facts, "DRIVER_GPUS", tmp_path / "proc")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert count_gpus() == 2
    tool.unlink()
    assert count_gpus() == 0
    (tmp_path / "proc" / "0000:00:1e.0").mkdir(parents=True)
    assert count_gpus() == 1


@pytest.mark.ray
def test_every_node_of_a_session_is_asked(ray_local, tmp_path):
    found, unreachable = gather({"out": ("write", str(tmp_path)), "weights": ("read", str(tmp_path / "none"))})
    assert unreachable == []
    (node,) = found
    assert node.node == platform.node()
    assert node.versions == versions()
    assert node.object_store_bytes == 200 * 2**20
    assert node.storage == {f"out: {tmp_path}": "", f"weights: {tmp_path / 'none'}": "no such file there"}
    # One machine has one clock.
    assert abs(node.clock_offset_s) <= node.clock_error_s + 1e-3
    assert [finding.level for finding in check_versions(versions(), found)] == ["ok"]
    assert [f.level for check in CHECKS for f in check(found) if f.check == "storage"] == ["ok", "problem"]
