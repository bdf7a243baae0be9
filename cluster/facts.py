"""Gathering facts about every machine of a cluster, for ``cluster.checks``: one small actor a node asks it."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import storage
from cluster.checks import Finding, NodeFacts
from cluster.errors import first_line
from cluster.version import __version__

DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")
Use = Literal["read", "write", "see"]
# A node that does not answer in it, does not.
TIMEOUT_S = 120.0


def versions() -> dict[str, str]:
    """Of what driver and workers must have in common."""
    import torch

    return {
        "prism": __version__,
        "python": platform.python_version(),
        "ray": ray.__version__,
        "torch": torch.__version__,
    }


class Probe:
    """Looks at the node it runs on."""

    def facts(self, node: str, disk: str, places: Mapping[str, tuple[Use, str]]) -> NodeFacts:
        """Everything but the clock.

        Args:
            node: name of it.
            disk: folder of Ray's files.
            places: field → (what for, URI).
        """
        import torch

        shm = Path("/dev/shm")
        found = shutil.disk_usage(_existing(disk))
        gpus = count_gpus()
        return NodeFacts(
            node=node,
            versions=versions(),
            gpus=gpus,
            torch_gpus=_torch_gpus() if gpus and torch.version.cuda else None,
            torch_cuda=torch.version.cuda or "",
            shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            disk=disk,
            disk_bytes=found.total,
            disk_free_bytes=found.free,
            storage={f"{field}: {uri}": try_place(use, uri) for field, (use, uri) in places.items()},
        )

    def clock(self) -> float:
        """Its clock, seconds since 1970."""
        return time.time()


def count_gpus() -> int:
    """Devices that the NVIDIA driver of this machine has, whatever this process may see of them."""
    if DRIVER_GPUS.is_dir():
        return len(list(DRIVER_GPUS.iterdir()))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _torch_gpus() -> int | None:
    """Devices that torch can use in a process from which Ray hides none; None: it does not say."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=90, env=env, check=True)
        return int(asked.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def try_place(use: Use, uri: str) -> str:
    """Why this process cannot use a place, empty if it can.

    Args:
        use: ``read``: the first byte of a file; ``write``: files below a folder; ``see``: a file is there.
        uri: of the file or folder.
    """
    try:
        if use == "write":
            storage.check_writable(uri, "out")
        elif use == "see":
            return "" if storage.exists(uri) else "it has another folder of this name"
        else:
            fs, path = storage.resolve(uri)
            with fs.open(path, "rb") as file:
                file.read(1)
    except FileNotFoundError:
        return "no such file there"
    except Exception as error:
        return first_line(error)
    return ""


def _existing(folder: str) -> Path:
    path = Path(folder)
    while not path.exists():
        path = path.parent
    return path


def gather(places: Mapping[str, tuple[Use, str]]) -> tuple[list[NodeFacts], list[Finding]]:
    """Facts of every node of the running session, and a problem for each that does not answer.

    Args:
        places: field → (what for, URI).
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    addresses = [str(node["NodeManagerHostname"] or node["NodeManagerAddress"]) for node in nodes]
    # Several on one machine, as in tests, are told apart.
    names = [
        f"{address} ({node['NodeID'][:6]})" if addresses.count(address) > 1 else address
        for address, node in zip(addresses, nodes, strict=True)
    ]
    disk = os.environ.get("RAY_TMPDIR") or os.path.join(tempfile.gettempdir(), "ray")
    kind: Any = ray.remote(num_cpus=0)(Probe)
    actors = [
        kind.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in nodes
    ]
    asked = [actor.facts.remote(name, disk, dict(places)) for actor, name in zip(actors, names, strict=True)]
    ray.wait(asked, num_returns=len(asked), timeout=TIMEOUT_S)
    facts, findings = [], []
    for node, name, actor, answer in zip(nodes, names, actors, asked, strict=True):
        try:
            found: NodeFacts = ray.get(answer, timeout=0.1)
            offset, error = _offset(actor)
        except Exception as error:
            findings.append(
                Finding(
                    level="problem",
                    check="nodes",
                    text=f"{name} does not answer ({first_line(error)})",
                    remedy="see the logs of that node below Ray's temporary folder; most often it lacks this package",
                )
            )
            continue
        has = node["Resources"]
        update = {
            "ray_gpus": has.get("GPU", 0),
            "object_store_bytes": int(has.get("object_store_memory", 0)),
            "clock_offset_s": offset,
            "clock_error_s": error,
        }
        facts.append(found.model_copy(update=update))
    for actor in actors:
        ray.kill(actor)
    return facts, findings


def _offset(actor: Any, times: int = 3) -> tuple[float, float]:
    """(clock of the actor's node minus ours, how wrong that may be), from the fastest of a few questions."""
    best = (0.0, float("inf"))
    for _ in range(times):
        before = time.time()
        there = ray.get(actor.clock.remote(), timeout=TIMEOUT_S)
        after = time.time()
        if (after - before) / 2 < best[1]:
            best = there - (before + after) / 2, (after - before) / 2
    return best
