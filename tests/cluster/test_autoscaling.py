"""A cluster that starts as a head without CPUs, grows while units wait, and shrinks when they are done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_autoscaler import FakeCluster, fake_cluster

# Nodes of one GPU; a second kind without any must stay away from GPU work.
WORKERS = {
    "gpu": {"resources": {"CPU": 2, "GPU": 1}, "max_workers": 3},
    "cpu": {"resources": {"CPU": 4}, "max_workers": 1},
}

# Units wait for what the sampler has seen, so that the curve's shape does not hang on this machine's speed.
DRIVER = """
import json, sys, threading, time
from pathlib import Path

import ray

from cluster.capacity import read_capacity
from cluster.errors import PrismError
from cluster.resources import ActorResources, TrainResources
from cluster.runner import ActorStage, fit_pools, run_ray
from cluster.resources import SessionOptions
from cluster.session import ray_session
from cluster.training import settle

folder = Path(sys.argv[2])


class Work:
    def __init__(self, folder):
        self.folder = Path(folder)

    def __call__(self, row):
        # The last one ends when the other nodes are gone, the others when there are two.
        flag = self.folder / ("shrunk" if row["id"] == "unit-0" else "grown")
        end = time.monotonic() + 120
        while not flag.exists():
            if time.monotonic() > end:
                raise RuntimeError(f"{flag.name} never came: {nodes()}")
            time.sleep(0.1)
        context = ray.get_runtime_context()
        return {**row, "node": context.get_node_id(), "gpus": len(context.get_accelerator_ids()["GPU"])}


class Short:
    # A second while there is one node alone.

    def __init__(self, folder):
        self.folder = Path(folder)

    def __call__(self, row):
        if not (self.folder / "grown").exists():
            time.sleep(1)
        return {**row, "node": ray.get_runtime_context().get_node_id()}


class Commit:
    def __call__(self, row):
        return {**row, "commit": ray.get_runtime_context().get_node_id()}


def nodes():
    alive = [node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" not in node["Resources"]]
    return sum("GPU" in node["Resources"] for node in alive), len(alive)


def sample(samples, stop):
    while not stop.is_set():
        samples.append(nodes()[0])
        if samples[-1] >= 2:
            (folder / "grown").touch()
        if samples[-1] == 1 and (folder / "grown").exists():
            (folder / "shrunk").touch()
        time.sleep(0.2)


try:
    with ray_session(SessionOptions(address=sys.argv[1])):
        stages = [ActorStage("work", Work, {"folder": str(folder)})]
        if sys.argv[3] == "chain":
            stages = [ActorStage(name, Short, {"folder": str(folder)}) for name in ("first", "second")]
            # Larger than a GPU node.
            stages.append(ActorStage("commit", Commit, {}, ActorResources(gpus=0, cpus=3, actors=1)))
        size = read_capacity()
        found = {"cpus": size.cpus, "gpus": size.gpus, "start": nodes(), "pools": fit_pools(stages, 12)}
        settled = settle(TrainResources(), 9, "resources.squeeze")
        found["groups"] = [settled.groups, settled.gpus]
        try:
            fit_pools([ActorStage("much", Work, {}, ActorResources(actors=4))], 12)
        except PrismError as error:
            found["refused"] = str(error)
        samples, stop = [], threading.Event()
        sampler = threading.Thread(target=sample, args=[samples, stop])
        sampler.start()
        rows = [{"id": f"unit-{index}", "error": ""} for index in range(int(sys.argv[4]))]
        try:
            found["rows"] = list(run_ray(rows, stages))
            found["at_end"] = nodes()
            while nodes()[1]:
                time.sleep(0.2)
        finally:
            stop.set()
            sampler.join()
        # The last one may be of a moment before.
        found["samples"] = [*samples, nodes()[0]]
    print(json.dumps(found))
except PrismError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text("a-token-of-this-test-alone-0123456789")
    return {"RAY_AUTH_TOKEN_PATH": str(file)}


@pytest.fixture(scope="module")
def cluster(tokens: dict[str, str]) -> Iterator[FakeCluster]:
    with fake_cluster(WORKERS, RAY_AUTH_MODE="token", **tokens) as found:
        yield found


def drive(cluster: FakeCluster, folder: Path, kind: str, rows: int, **env: str) -> dict[str, Any]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-c", DRIVER, cluster.address, str(folder), kind, str(rows)]
    done = subprocess.run(command, env={**own, **env}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_come_while_units_wait_and_go_when_they_are_done(
    cluster: FakeCluster, tokens: dict[str, str], tmp_path: Path
) -> None:
    found = drive(cluster, tmp_path, "alone", 12, **tokens)
    # Before any node was there:
    assert found["start"] == [0, 0]
    assert (found["cpus"], found["gpus"]) == (3 * 2 + 4, 3)
    assert found["pools"] == [[1, 3, 0.0, 1.0]]
    assert found["groups"] == [3, 1]
    assert found["refused"] == (
        "resources: much ask for 4 GPUs at least, but Ray can get 3; lower their cpus, gpus or actors"
    )
    # All units came back, from several nodes.
    rows = found["rows"]
    assert sorted(row["id"] for row in rows) == sorted(f"unit-{index}" for index in range(12))
    assert [row["error"] for row in rows] == [""] * 12
    assert len({row["node"] for row in rows}) >= 2
    assert {row["gpus"] for row in rows} == {1}
    # The curve of GPU nodes: none, up to several, down to one while the last unit still works, none.
    samples = found["samples"]
    assert samples[0] == 0
    assert max(samples) >= 2
    assert found["at_end"][0] == 1
    assert samples[-1] == 0
    top = samples.index(max(samples))
    assert samples[:top] == sorted(samples[:top])


@pytest.mark.ray
@pytest.mark.slow
def test_a_chain_starts_on_one_node_and_gets_more(cluster: FakeCluster, tokens: dict[str, str], tmp_path: Path) -> None:
    """Two GPU stages share the first device that comes; the stage without GPU has a node of the other kind."""
    found = drive(cluster, tmp_path, "chain", 150, **tokens)
    assert found["pools"] == [[1, 3, 0.0, 0.5], [1, 3, 0.0, 0.5], [1, 1, 3.0, 0.0]]
    rows = found["rows"]
    assert sorted(row["id"] for row in rows) == sorted(f"unit-{index}" for index in range(150))
    assert [row["error"] for row in rows] == [""] * 150
    assert not {row["node"] for row in rows} & {row["commit"] for row in rows}
    samples = found["samples"]
    assert samples[0] == 0
    assert max(samples) >= 2
    assert samples[-1] == 0


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_wants_a_token_says_so(cluster: FakeCluster, tmp_path: Path) -> None:
    found = drive(cluster, tmp_path, "alone", 1, HOME=str(tmp_path))
    assert found["error"].startswith(
        f"resources.session.address: the cluster at {cluster.address} refuses this command"
    )


@pytest.mark.ray
@pytest.mark.slow
def test_recover_by_command_waits_for_its_nodes_and_gives_the_same_bytes(
    cluster: FakeCluster, tokens: dict[str, str], tmp_path: Path
) -> None:
    def prism(command: str, out: Path, *words: str) -> str:
        small = ["squeeze.epochs=1", "recover.ipc=2", "recover.chunk=5", "recover.iterations=3", f"out={out}"]
        own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        line = [sys.executable, "-m", "pipeline", command, *small, *words]
        done = subprocess.run(line, env={**own, **tokens}, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def shards(out: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (out / "recovered").glob("*.parquet")}

    prism("squeeze", tmp_path / "serial", "--serial")
    shutil.copytree(tmp_path / "serial", tmp_path / "grown")
    prism("recover", tmp_path / "serial", "--serial")
    said = prism("recover", tmp_path / "grown", f"resources.session.address={cluster.address}")
    assert "recover: waiting for a node with 0 CPUs and 1 GPUs" in said
    assert len(shards(tmp_path / "grown")) == 4
    assert shards(tmp_path / "grown") == shards(tmp_path / "serial")
