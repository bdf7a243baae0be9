"""The cluster at its full size: what its autoscaler may add, whatever of it runs now, and what fits it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from cluster import capacity
from cluster.capacity import Capacity, Growth, Node, autoscaler_config, combine, growth_of
from cluster.errors import UserError
from cluster.resources import ActorResources, TrainResources, fit_actors, fit_groups

ROOT = Path(__file__).resolve().parents[2]
HEAD = Node(0, 0)
ONE_GPU = Node(8, 1)


def grown(*running: Node, types: Any = ((ONE_GPU, 8),), most: int = 8, head: Node = HEAD) -> Capacity:
    return combine([head], list(running), Growth(tuple(types), most))


@pytest.mark.parametrize(
    ("node", "cpus", "gpus", "room"),
    [
        (Node(2, 0), 1, 0, 2),
        (Node(2, 0), 0.3, 0, 6),
        (Node(2, 0), 0.9, 0, 2),
        (Node(2, 0), 4, 0, 0),
        (Node(2, 0), 0, 1, 0),
        (Node(8, 4), 0, 1, 4),
        (Node(8, 4), 4, 1, 2),
        (Node(8, 4), 0, 2, 2),
        (Node(8, 4), 0, 1 / 3, 12),
        # Three on each device, not thirteen on four.
        (Node(8, 4), 0, 0.3, 12),
        (Node(8, 4), 0, 0.6, 4),
    ],
)
def test_room_on_a_node(node: Node, cpus: float, gpus: float, room: int) -> None:
    assert node.room(cpus, gpus) == room


def test_full_size_is_the_same_whatever_runs() -> None:
    """Threads of trainings, hence results, follow from it."""
    static = Node(4, 0)
    sizes = [grown(*[ONE_GPU] * count, static, head=Node(2, 0)) for count in range(9)]
    assert {(size.cpus, size.gpus, size.room(2, 1)) for size in sizes} == {(2 + 4 + 64, 8, 8)}


def test_more_nodes_than_the_autoscaler_may_start_count_too() -> None:
    assert grown(*[ONE_GPU] * 3, types=[(ONE_GPU, 1)], most=1).gpus == 3


def test_all_types_together_have_a_bound() -> None:
    found = grown(types=[(Node(8, 1), 8), (Node(48, 4), 4), (Node(64, 0), 2)], most=6)
    assert found.gpus == 4 * 4 + 2 * 1
    assert found.cpus == 2 * 64 + 4 * 48
    assert found.room(0, 1) == 18
    assert found.room(10, 1) == 4 * 4


def test_what_the_launchers_file_lets_ray_start() -> None:
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    size = combine([HEAD], [], growth_of(config))
    workers = {name: kind for name, kind in config["available_node_types"].items() if name != "head"}
    assert size.gpus == sum(kind["max_workers"] * kind["resources"]["GPU"] for kind in workers.values())
    assert size.gpus_to_start_with == 1
    # A type without a bound of its own may fill the cluster, as Ray has it.
    assert growth_of({"max_workers": 3, "available_node_types": {"w": {"resources": {"CPU": 2}}}}).types[0][1] == 3


@pytest.mark.parametrize("autoscaling", [True, False])
def test_what_kuberays_object_lets_ray_start(
    autoscaling: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Read from the API server by a pod of the cluster, with Ray's own client and its own reading of the object."""
    from ray.autoscaler._private.kuberay import node_provider

    cluster = yaml.safe_load((ROOT / "kuberay" / "raycluster.yaml").read_text())
    cluster["spec"]["enableInTreeAutoscaling"] = autoscaling
    asked = []

    class Client:
        def __init__(self, namespace: str):
            asked.append(namespace)

        def get(self, path: str) -> dict[str, Any]:
            asked.append(path)
            return cluster

    (tmp_path / "namespace").write_text("prism\n")
    monkeypatch.setattr(capacity, "NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setattr(node_provider, "KubernetesHttpApiClient", Client)
    monkeypatch.setenv("RAY_CLUSTER_NAME", "prism")
    found = autoscaler_config("127.0.0.1:1")
    assert asked == ["prism", "rayclusters/prism"]
    if not autoscaling:
        assert found is None
        return
    assert found is not None
    groups = cluster["spec"]["workerGroupSpecs"]
    assert combine([HEAD], [], growth_of(found)).room(0, 1) >= sum(group["maxReplicas"] for group in groups)

    def refused(self: Any, path: str) -> dict[str, Any]:
        raise PermissionError("403")

    monkeypatch.setattr(Client, "get", refused)
    with pytest.raises(PermissionError):
        autoscaler_config("127.0.0.1:1")


def test_the_autoscaler_of_this_cluster_is_found_among_processes(tmp_path: Path) -> None:
    """``ray start --autoscaling-config`` hands the file to a process of the head; others have their own clusters."""
    assert ray.__version__  # psutil comes with it
    (tmp_path / "monitor.py").write_text("import time; print('up', flush=True); time.sleep(60)")
    processes = []
    for port, most in ((4001, 3), (4002, 5)):
        config = {"head_node_type": "h", "available_node_types": {"w": {"resources": {"CPU": 2}, "max_workers": most}}}
        file = tmp_path / f"{port}.yaml"
        file.write_text(yaml.safe_dump(config))
        words = ["-u", str(tmp_path / "monitor.py"), f"--gcs-address=10.0.0.1:{port}", f"--autoscaling-config={file}"]
        processes.append(subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE))
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == b"up\n"
        found = autoscaler_config("127.0.0.1:4002")
        assert found is not None
        assert growth_of(found) == Growth(((Node(2, 0, math.inf), 5),), 5)
        assert autoscaler_config("127.0.0.1:4003") is None
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def pools(resources: dict[str, Any], size: Capacity, *, stages: int = 1, rows: int = 2000) -> list[Any]:
    return fit_actors([("s", ActorResources(**resources))] * stages, rows, size)


@pytest.mark.parametrize(
    ("resources", "stages", "rows", "expected"),
    [
        # Nothing runs but a head without CPUs: one actor for every GPU that may come, no more than units.
        ({}, 1, 2000, (1, 8, 0, 1)),
        ({}, 1, 3, (1, 3, 0, 1)),
        ({"gpus": 0.5}, 1, 2000, (1, 16, 0, 0.5)),
        ({"gpus": 0.3, "cpus": 4}, 1, 2000, (1, 16, 4, 0.3)),
        # What is said is taken, since an autoscaler may not tell all; a minimum that can never be is refused below.
        ({"actors": (2, 20)}, 1, 2000, (2, 20, 0, 1)),
        ({"actors": (2, 20)}, 1, 1, (1, 1, 0, 1)),
        # A chain runs on the first node that comes, and grows together.
        ({}, 3, 2000, (1, 8, 0, 1 / 3)),
        ({"actors": 1}, 3, 2000, (1, 1, 0, 1 / 3)),
        # CPU actors go where CPUs are.
        ({"gpus": 0}, 1, 2000, (1, 64, 0.9, 0)),
        ({"gpus": 0, "threads": 16}, 1, 2000, (1, 1, 7.2, 0)),
        ({"gpus": 0, "cpus": 4}, 1, 2000, (1, 16, 4, 0)),
    ],
)
def test_pools_follow_what_may_come(
    resources: dict[str, Any], stages: int, rows: int, expected: tuple[float, ...]
) -> None:
    assert pools(resources, grown(), stages=stages, rows=rows) == [pytest.approx(expected)] * stages
    assert pools(resources, grown(ONE_GPU), stages=stages, rows=rows) == [pytest.approx(expected)] * stages


def test_commit_stage_of_a_gpu_chain_takes_no_gpu() -> None:
    chain = [(name, ActorResources()) for name in ("a", "b")] + [("commit", ActorResources(gpus=0, actors=1))]
    assert [tuple(pool) for pool in fit_actors(chain, 100, grown(types=[(Node(8, 2), 2)], most=2))] == [
        (1, 2, 0, 1),
        (1, 2, 0, 1),
        (1, 1, 1, 0),
    ]


def test_pools_of_a_chain_never_ask_for_more_than_there_is() -> None:
    """Where one took what the next one needs, both would wait for ever."""
    for stages in (2, 3, 4):
        found = pools({"cpus": 1, "actors": (1, 8)}, combine([Node(4, 0)], [], Growth((), 0)), stages=stages)
        assert sum(pool.high for pool in found) == 4
        assert all(pool.high >= 1 for pool in found)


def test_memory_bounds_processes() -> None:
    small = combine([Node(16, 0, 8 * 2**30)], [], Growth((), 0))
    assert [tuple(pool) for pool in pools({}, small)] == [(1, 3, 1, 0)]
    assert [pool.high for pool in pools({}, small, stages=4)] == [1] * 4
    assert pools({"actors": 10}, small)[0].high == 10


@pytest.mark.parametrize(
    ("resources", "size", "words"),
    [
        ({"actors": 9}, grown(), "s ask for 9 GPUs at least, but Ray can get 8; lower"),
        ({"gpus": 2}, grown(), "an actor of s asks for 0 CPUs and 2 GPUs, but Ray can get no node with as many"),
        ({"cpus": 16}, grown(), "an actor of s asks for 16 CPUs and 1 GPUs, but Ray can get no node with as many"),
        ({}, combine([HEAD], [], Growth((), 0)), "s ask for 1 CPUs at least, but Ray has 0; lower"),
        ({"gpus": 1}, combine([Node(4, 0)], [], Growth((), 0)), "s ask for 1 GPUs at least, but Ray has 0; lower"),
    ],
)
def test_what_can_never_fit_is_refused(resources: dict[str, Any], size: Capacity, words: str) -> None:
    with pytest.raises(UserError, match=f"^resources: {words}"):
        pools(resources, size)


def test_gpus_are_parts_of_one_or_whole_ones() -> None:
    with pytest.raises(ValueError, match=r"gpus = 1\.5 is neither a part of one GPU nor whole ones; write 2"):
        ActorResources(gpus=1.5)


def test_trainings_wait_for_gpus_that_may_come() -> None:
    found = fit_groups(TrainResources(), 5, "resources.squeeze", grown())
    assert (found.groups, found.gpus, found.threads) == (5, 1, 8)
    assert found == fit_groups(TrainResources(), 5, "resources.squeeze", grown(ONE_GPU, ONE_GPU))
    with pytest.raises(UserError, match="a training asks for 9 GPUs, but Ray can get 8; lower workers, cpus or gpus"):
        fit_groups(TrainResources(workers=9), 1, "resources.squeeze", grown())
    with pytest.raises(
        UserError, match="1 workers ask for 9 CPUs and 1 GPUs each, but the nodes that Ray can get hold"
    ):
        fit_groups(TrainResources(cpus=9), 1, "resources.squeeze", grown())


@pytest.mark.ray
def test_an_autoscaler_that_does_not_tell_is_mentioned(
    ray_local: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(gcs_address: str) -> None:
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(capacity, "autoscaler_config", refused)
    assert capacity.read_capacity().growth.types == ()
    assert "may start is not known (403 Forbidden), so only the nodes that run now count" in caplog.text


@pytest.mark.ray
def test_a_private_session_is_what_it_is(ray_local: None) -> None:
    found = capacity.read_capacity()
    assert (found.cpus, found.gpus, found.growth.types) == (2, 0, ())
    assert 0 < found.memory < math.inf
