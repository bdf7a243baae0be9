"""Actors, machines and drivers that die in the middle of recovery: always the bytes of an undisturbed run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for

from cluster.attempts import MAX_ATTEMPTS
from cluster.progress import read_progress
from cluster.record import read_record

ROOT = Path(__file__).resolve().parents[2]
# Steps of a unit of some seconds.
LONG = 300


def digests(folder: Path) -> dict[str, str]:
    found = {p.name: p for p in folder.glob("*.parquet") if not p.name.startswith(".")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(found.items())}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained teachers, shared by all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def runs(prism: Any, tiny_config: Any, cache: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path, Path]]:
    """(reference directory, recovered serially; directory and configuration of a run whose teachers are ready)."""

    def make(**recover: Any) -> tuple[Path, Path, Path]:
        out = {}
        sections: dict[str, Any] = {"recover": {"chunk": 3, **recover}, "squeeze": {"cache": str(cache)}}
        for name in ("whole", "cut"):
            path = tiny_config(out=str(tmp_path / name), **sections)
            out[name] = path.rename(tmp_path / f"{name}.yaml")
            code, _, err = prism("squeeze", out[name], "--serial")
            assert code == 0, err
        code, _, err = prism("recover", out["whole"], "--serial", "recover.checkpoint_every=0")
        assert code == 0, err
        return tmp_path / "whole", tmp_path / "cut", out["cut"]

    return make


class Driver:
    """``prism recover`` in a process of its own."""

    def __init__(self, config: Path, *words: str, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "recover", str(config), *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", **environment},
        )

    def wait_for(self, ready: Callable[[], Any], what: str, timeout: float = 120) -> Any:
        """What ``ready`` gives, once it gives something."""
        end = time.monotonic() + timeout
        while not (found := ready()):
            assert self.process.poll() is None, f"ended before {what}: {self.process.communicate()[0]}"
            assert time.monotonic() < end, f"no {what} in time"
            time.sleep(0.02)
        return found

    def finish(self, timeout: float = 240) -> str:
        text = self.process.communicate(timeout=timeout)[0]
        assert self.process.returncode == 0, text
        return text

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            # The driver alone: a private session ends with it.
            self.process.kill()
            self.process.wait()


def records(out: Path) -> dict[str, dict[str, Any]]:
    """Unit → its start record."""
    return read_progress(str(out / "progress" / "recover"))


def working(out: Path) -> dict[int, str]:
    """Living process → the unit it works on."""
    found = {r["pid"]: name for name, r in records(out).items() if r["done"] < r["total"]}
    return {pid: name for pid, name in found.items() if Path(f"/proc/{pid}").exists()}


def second_start(out: Path, unit: str) -> dict[str, Any] | None:
    """The record of a unit's second start; it goes when the unit is finished and counted."""
    found = records(out).get(unit, {})
    return found if found.get("attempt") == 2 else None


def retried(out: Path) -> int:
    """What the driver has counted."""
    found = read_record(str(out / "progress" / "recover"))
    return found.retried if found else 0


def assert_whole(whole: Path, cut: Path) -> None:
    for folder in ("recovered", "init"):
        assert digests(cut / folder) == digests(whole / folder)
    assert not list((cut / "progress" / "state").glob("*"))


@contextlib.contextmanager
def beside(action: Callable[[], None]) -> Iterator[None]:
    """Do something while the body runs in this thread; both must succeed."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            action()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def in_its_middle(out: Path, driver: Driver | None = None) -> tuple[int, str]:
    """A process and the unit that it has worked on for a moment."""

    def ready() -> list[tuple[int, str]]:
        assert driver is None or driver.process.poll() is None, driver.process.communicate()[0]
        found = list(working(out).items())
        time.sleep(0.3 if found else 0)
        return [(pid, unit) for pid, unit in found if working(out).get(pid) == unit]

    return wait_for(ready)[0]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigkill_of_an_actor_in_the_middle_of_a_unit(prism: Any, runs: Any, ray_local: None) -> None:
    whole, cut, config = runs(iterations=LONG)
    again: list[dict[str, Any]] = []

    def kill() -> None:
        pid, unit = in_its_middle(cut)
        os.kill(pid, signal.SIGKILL)
        again.append(wait_for(lambda: second_start(cut, unit)))

    with beside(kill):
        code, _, err = prism("recover", config, "resources.recover.actors=2")
    assert code == 0, err
    assert_whole(whole, cut)
    assert retried(cut) == 1
    assert (again[0]["session_attempt"], again[0]["from"]) == (2, 0)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_sigterm_keeps_the_unit_in_its_middle(prism: Any, runs: Any, ray_local: None) -> None:
    """A notice of preemption, without checkpoints asked for: goes on where it was, and does not count as a failure."""
    whole, cut, config = runs(iterations=LONG)
    again: list[dict[str, Any]] = []

    def notify() -> None:
        pid, unit = in_its_middle(cut)
        os.kill(pid, signal.SIGTERM)
        again.append(wait_for(lambda: second_start(cut, unit)))
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), 20)

    with beside(notify):
        code, _, err = prism("recover", config, "resources.recover.actors=1")
    assert code == 0, err
    assert_whole(whole, cut)
    assert retried(cut) == 1
    assert 0 < again[0]["from"] < LONG
    assert again[0]["session_attempt"] == 1


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without room for recovery; tests add machines, with one logical GPU each, so that each has one unit."""
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 200 * 2**20, "include_dashboard": False},
    )
    yield found
    found.shutdown()


def add_machine(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 * 2**20)


def raylet_of(machine: Any) -> int:
    return int(machine.all_processes["raylet"][0].process.pid)


def machine_of(pid: int, machines: list[Any]) -> Any:
    """The machine whose raylet started a worker."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return next(machine for machine in machines if raylet_of(machine) == parent)


def on(cluster: Any, config: Path, *words: str) -> Driver:
    return Driver(config, f"resources.session.address={cluster.address}", "resources.recover.gpus=1", *words)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sigkill_of_a_machine_in_the_middle_of_a_unit(runs: Any, cluster: Any) -> None:
    """Its unit moves; the units that it had finished are not done again, though their results are lost with it."""
    whole, cut, config = runs(ipc=6, iterations=LONG)
    machines = [add_machine(cluster) for _ in range(2)]
    with on(cluster, config, "resources.recover.actors=2") as driver:
        driver.wait_for(lambda: len(digests(cut / "recovered")) >= 2, "two units")
        pid, unit = in_its_middle(cut, driver)
        lost = machine_of(pid, machines)
        kept = {p: p.stat().st_mtime_ns for p in (cut / "recovered").glob("unit-*")}
        assert unit not in {p.stem for p in kept}
        # SIGKILL to the raylet first, as remove_node does too, but with its workers left to find out by themselves.
        os.kill(raylet_of(lost), signal.SIGKILL)
        cluster.remove_node(lost, allow_graceful=False)
        driver.wait_for(lambda: second_start(cut, unit), "second start")
        driver.finish()
    assert_whole(whole, cut)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert retried(cut) == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_notice_to_a_machine(runs: Any, cluster: Any) -> None:
    """What a preStop hook calls: units keep their state, and nothing is started there any more."""
    from cluster.preemption import notify

    whole, cut, config = runs(ipc=2, iterations=8 * LONG)
    leaving = add_machine(cluster)
    with on(cluster, config, "resources.recover.actors=[1,2]") as driver:
        _, unit = in_its_middle(cut, driver)
        staying = add_machine(cluster)
        assert notify(20, leaving.node_id) == (1, 0)
        kept = records(cut)[unit]["done"]
        moved = driver.wait_for(lambda: [p for p, name in working(cut).items() if name == unit], "second start")
        assert machine_of(moved[0], [leaving, staying]) is staying
        found = driver.wait_for(lambda: second_start(cut, unit), "record of it")
        driver.finish()
    assert_whole(whole, cut)
    assert retried(cut) == 1
    assert 0 < kept == found["from"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_machine_that_joins_late_gets_units(runs: Any, cluster: Any) -> None:
    whole, cut, config = runs(ipc=8, iterations=2 * LONG)
    first = add_machine(cluster)
    with on(cluster, config, "resources.recover.actors=[1,2]") as driver:
        in_its_middle(cut, driver)
        late = add_machine(cluster)
        driver.wait_for(
            lambda: any(machine_of(pid, [first, late]) is late for pid in list(working(cut))),
            "unit on the late machine",
        )
        driver.finish()
    assert_whole(whole, cut)
    assert retried(cut) == 0


class Chaos:
    """Kills at random: workers and whole machines, which are replaced; no unit so often that it would be given up."""

    def __init__(self, cluster: Any, out: Path, machines: list[Any], seed: int):
        self.cluster, self.out, self.machines, self.rng = cluster, out, machines, random.Random(seed)
        self.kills = {"worker": 0, "machine": 0, "notice": 0}

    @property
    def total(self) -> int:
        return sum(self.kills.values())

    def strike(self) -> None:
        """End a worker that is in the middle of a unit, if there is one."""
        found = records(self.out)
        at_risk = {name for name, r in found.items() if r["session_attempt"] < MAX_ATTEMPTS}
        targets = sorted((pid, unit) for pid, unit in working(self.out).items() if unit in at_risk)
        if not targets:
            return
        pid, unit = self.rng.choice(targets)
        time.sleep(self.rng.uniform(0.5, 2.0))
        if working(self.out).get(pid) != unit:
            return
        kind = self.rng.choice(["worker", "worker", "worker", "notice", "notice", "machine"])
        # It may have ended by itself meanwhile.
        with contextlib.suppress(OSError, StopIteration):
            if kind == "machine":
                lost = machine_of(pid, self.machines)
                self.machines.remove(lost)
                self.cluster.remove_node(lost, allow_graceful=False)
                self.machines.append(add_machine(self.cluster))
            else:
                os.kill(pid, signal.SIGTERM if kind == "notice" else signal.SIGKILL)
                wait_for(lambda: not Path(f"/proc/{pid}").exists(), 20)
            self.kills[kind] += 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_soak(runs: Any, cluster: Any) -> None:
    """At least 20 kills in one run: nothing is lost, nothing is done twice, and Ray Data does not stand still."""
    whole, cut, config = runs(ipc=8, iterations=3 * LONG, checkpoint_every=50)
    machines = [add_machine(cluster) for _ in range(2)]
    chaos = Chaos(cluster, cut, machines, seed=1)
    committed: dict[str, int] = {}
    words = ["resources.recover.actors=2", "resources.session.no_progress_timeout_s=240"]
    with on(cluster, config, *words) as driver:
        end = time.monotonic() + 1100
        while driver.process.poll() is None and time.monotonic() < end:
            if chaos.total < 22:
                chaos.strike()
            time.sleep(0.05)
            for path in (cut / "recovered").glob("unit-*"):
                now = path.stat().st_mtime_ns
                assert committed.setdefault(path.name, now) == now, f"{path.name} was done twice"
        driver.finish(timeout=1)
    print(chaos.kills, "restarts:", retried(cut))
    assert chaos.total >= 20
    assert min(chaos.kills.values()) >= 1
    assert_whole(whole, cut)
    # A kill may find a unit in its last moment, committed but not yet reported.
    assert chaos.total - 3 <= retried(cut) <= chaos.total + chaos.kills["machine"]
