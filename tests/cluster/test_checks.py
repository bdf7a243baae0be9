"""Findings from made-up facts: each fault is found, named with its node, and has a remedy; a sound cluster has none."""

from __future__ import annotations

import pytest

from cluster.checks import CHECKS, Finding, NodeFacts, check_clocks, check_gpus, check_versions

VERSIONS = {"prism": "0.1.0", "python": "3.11.7", "ray": "2.60.0", "torch": "2.15.0"}
GIB = 2**30


def node(name: str = "node-1", **values) -> NodeFacts:
    sound = {
        "versions": VERSIONS, "shm_bytes": 8 * GIB, "object_store_bytes": 2 * GIB, "disk_bytes": 100 * GIB,
        "disk_free_bytes": 50 * GIB, "open_files": 65536,
    }  # fmt: skip
    return NodeFacts(node=name, **(sound | values))


def gpu_node(name: str = "gpu-1", **values) -> NodeFacts:
    return node(name, **({"gpus": 4, "torch_gpus": 4, "torch_cuda": "13.0", "ray_gpus": 4} | values))


def everything(*nodes: NodeFacts, wanted: tuple[str, ...] = ()) -> list[Finding]:
    found = check_versions(VERSIONS, nodes) + check_gpus(nodes, wanted)
    return found + [finding for check in CHECKS for finding in check(nodes)]


def bad(*nodes: NodeFacts, wanted: tuple[str, ...] = ()) -> list[Finding]:
    return [finding for finding in everything(*nodes, wanted=wanted) if finding.level != "ok"]


def test_a_sound_cluster_has_a_line_for_each_check_and_nothing_else():
    found = everything(gpu_node(storage={"out: s3://b/run": ""}), node(), wanted=("resources.recover.gpus",))
    assert {finding.level for finding in found} == {"ok"}
    assert [finding.check for finding in found] == [
        "versions", "gpus", "shared memory", "clocks", "open files", "disk", "storage",
    ]  # fmt: skip
    assert found[0].text == "prism 0.1.0, python 3.11.7, ray 2.60.0, torch 2.15.0 everywhere"
    assert found[1].text == "4 seen by Ray"


@pytest.mark.parametrize(
    ("faulty", "level", "check", "text", "remedy"),
    [
        (gpu_node("g", ray_gpus=0), "problem", "gpus", "g has 4 GPUs, but Ray sees none", "CUDA_VISIBLE_DEVICES"),
        (gpu_node("g", ray_gpus=2), "warning", "gpus", "Ray counts 2 GPUs on g, which has 4", "--num-gpus"),
        (gpu_node("g", gpus=0, torch_gpus=None), "problem", "gpus", "Ray counts 4 GPUs on g, which has 0", "number of"),
        (gpu_node("g", torch_gpus=0), "problem", "gpus", "torch (CUDA 13.0) can use 0", "NVIDIA driver"),
        (gpu_node("g", torch_cuda="", torch_gpus=None), "problem", "gpus", "build without CUDA", "CUDA build of torch"),
        (node("w", versions=VERSIONS | {"torch": "2.14.0"}), "problem", "versions",
         "torch is 2.15.0 in the driver and 2.14.0 on w", "constraints.txt"),
        (node("w", versions=VERSIONS | {"prism": "0.0.9"}), "problem", "versions",
         "prism is 0.1.0 in the driver and 0.0.9 on w", "constraints.txt"),
        (node("w", versions=VERSIONS | {"python": "3.12.1"}), "problem", "versions", "3.12.1 on w", "constraints.txt"),
        (node("w", versions=VERSIONS | {"python": "3.11.9"}), "warning", "versions", "3.11.9 on w", "constraints.txt"),
        (node("w", shm_bytes=64 * 2**20), "problem", "shared memory", "/dev/shm of w has 64 MiB, Ray's object store "
         "wants 2.0 GiB", "--shm-size"),
        (node("w", clock_offset_s=42.0, clock_error_s=0.5), "warning", "clocks", "w is 42 s ahead of", "chrony"),
        (node("w", clock_offset_s=-3600.0), "problem", "clocks", "w is 3600 s behind the driver's", "chrony"),
        (node("w", open_files=1024), "warning", "open files", "1,024 files on w", "ulimit -n 65536"),
        (node("w", disk_free_bytes=3 * GIB), "problem", "disk", "3.0 GiB free (97 % used); Ray stops", "make room"),
        (node("w", disk_bytes=20 * GIB, disk_free_bytes=5 * GIB), "warning", "disk", "of w has 5.0 GiB", "make room"),
        (node("w", storage={"out: s3://b/run": "AccessDenied"}), "problem", "storage",
         "out: s3://b/run: not usable from w (AccessDenied)", "role or credentials"),
    ],
)  # fmt: skip
def test_one_fault_is_one_finding(faulty, level, check, text, remedy):
    (found,) = bad(node("sound"), faulty)
    assert (found.level, found.check) == (level, check)
    assert text in found.text
    assert remedy in found.remedy


def test_configuration_that_asks_for_a_gpu_where_there_is_none():
    (found,) = bad(node(), wanted=("resources.recover.gpus", "resources.squeeze.gpus"))
    assert (found.level, found.check) == ("problem", "gpus")
    assert "resources.recover.gpus, resources.squeeze.gpus asks for one" in found.text
    assert not bad(node())
    # A cluster that has grown from nothing, and back.
    (found,) = check_gpus([node()], ["resources.recover.gpus"], most=24)
    assert (found.level, found.text) == ("ok", "0 seen by Ray, up to 24 when work waits for them")


def test_many_nodes_with_one_fault_are_one_line():
    (found,) = bad(*(node(f"w{i}", open_files=1024) for i in range(9)))
    assert "w0, w1, w2, w3 and 5 more" in found.text
    (found,) = bad(*(node(f"w{i}", versions=VERSIONS | {"ray": "2.58.0"}) for i in range(9)))
    assert "ray is 2.60.0 in the driver and 2.58.0 on w0, w1, w2, w3 and 5 more" in found.text


def test_a_slow_answer_is_no_clock_skew():
    assert [f.level for f in check_clocks([node(clock_offset_s=6.0, clock_error_s=5.0)])] == ["ok"]
