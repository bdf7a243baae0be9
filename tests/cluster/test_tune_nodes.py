"""Jobs of a search on several machines, which are processes of this one: what a job takes, and a machine that dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# CPUs and GPUs of machines, and how many jobs of a CPU and half a GPU each has room for.
MACHINES = {(4, 1): 2, (2, 2): 2, (1, 1): 1, (2, 0): 0}
JOBS = 12
Start = Callable[..., tuple[str, list[Any]]]

# In a process of its own, for that of the tests may hold another session.
DRIVER = """
import json, os, sys, time
from pathlib import Path

import ray

from cluster.capacity import read_capacity
from cluster.resources import SessionOptions
from cluster.session import ray_session
from cluster.tune import run_tune

address, folder, most = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])


class Jobs:
    most_jobs = most

    def __init__(self):
        self.left, self.found = [f"job-{number}" for number in range(most)], {}

    @property
    def finished(self):
        return len(self.found) == most

    def hand_out(self):
        return {"key": self.left.pop(0)} if self.left else None

    def take(self, key, result):
        assert key not in self.found
        self.found[key] = result


def work(job):
    start, context = time.monotonic(), ray.get_runtime_context()
    (folder / f"{job['key']}@{context.get_node_id()}@{os.getpid()}").touch()
    while not (folder / "go").exists():
        assert time.monotonic() < start + 120, sorted(path.name for path in folder.iterdir())
        time.sleep(0.05)
    taken, (device,) = context.get_assigned_resources(), context.get_accelerator_ids()["GPU"]
    reserved = ray.util.placement_group_table(ray.util.get_current_placement_group())
    return {
        "value": 0.0,
        "node": context.get_node_id(),
        "device": device,
        "reserved": json.dumps([reserved["bundles"][0], reserved["bundles_to_node_id"][0]]),
        "taken": json.dumps(taken),
        "start": start,
        "end": time.monotonic(),
    }


with ray_session(SessionOptions(address=address)):
    jobs = Jobs()
    room = read_capacity().room(1, 0.5)
    run_tune(work, jobs, str(folder), 1, 0.5, most)
    print(json.dumps({"room": room, "jobs": jobs.found}))
"""


@contextlib.contextmanager
def driver(address: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", DRIVER, address, str(folder), str(JOBS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def starts(folder: Path) -> list[tuple[str, str, int]]:
    """Key, node and process of every start of a job."""
    found = [path.name.split("@") for path in folder.glob("job-*")]
    return [(key, node, int(pid)) for key, node, pid in found]


def wait_for_starts(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    end = time.monotonic() + 120
    while len(starts(folder)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, starts(folder)
        time.sleep(0.05)


def results(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def most_at_once(jobs: list[dict[str, Any]]) -> int:
    return max((sum(other["start"] <= job["start"] < other["end"] for other in jobs) for job in jobs), default=0)


@pytest.mark.ray
@pytest.mark.parametrize("count", [2, pytest.param(len(MACHINES), marks=pytest.mark.slow)])
def test_jobs_take_what_is_reserved_for_them_and_no_more(start_machines: Start, tmp_path: Path, count: int) -> None:
    rooms = dict([*MACHINES.items()][:count])
    address, machines = start_machines(*rooms)
    with driver(address, tmp_path) as process:
        # All that have room are there at once, or this would never end.
        wait_for_starts(process, tmp_path, sum(rooms.values()))
        (tmp_path / "go").touch()
        found = results(process)
    assert found["room"] == sum(rooms.values())
    jobs = found["jobs"]
    assert sorted(jobs) == sorted(f"job-{number}" for number in range(JOBS))
    assert len(starts(tmp_path)) == JOBS
    for job in jobs.values():
        bundle, node = json.loads(job["reserved"])
        assert (bundle, node) == ({"CPU": 1.0, "GPU": 0.5}, job["node"])
        assert json.loads(job["taken"]) == bundle
    for machine, ((_, gpus), room) in zip(machines, rooms.items(), strict=True):
        here = [job for job in jobs.values() if job["node"] == machine.node_id]
        assert most_at_once(here) == room
        devices = [[job for job in here if job["device"] == str(device)] for device in range(gpus)]
        assert sum(map(len, devices)) == len(here)
        assert all(most_at_once(device) <= 2 for device in devices)


@pytest.mark.ray
@pytest.mark.slow
def test_a_machine_that_dies_loses_no_job(start_machines: Start, tmp_path: Path) -> None:
    """Those in its middle are run again elsewhere, the others once."""
    address, machines = start_machines(*MACHINES)
    with driver(address, tmp_path) as process:
        wait_for_starts(process, tmp_path, sum(MACHINES.values()))
        dead = machines[1]
        lost = {key: pid for key, node, pid in starts(tmp_path) if node == dead.node_id}
        # The raylet first, for its workers' ends are not to be told by anybody.
        dead.kill_raylet()
        for pid in lost.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        (tmp_path / "go").touch()
        jobs = results(process)["jobs"]
    assert len(lost) == 2
    assert all(jobs.values())
    assert {job["node"] for job in jobs.values()} == {machines[0].node_id, machines[2].node_id}
    counted = Counter(key for key, _, _ in starts(tmp_path))
    assert counted == {f"job-{number}": 1 + (f"job-{number}" in lost) for number in range(JOBS)}
