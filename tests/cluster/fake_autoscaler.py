"""A cluster of one machine whose autoscaler starts and ends worker nodes that are processes of this machine.

Ray's own ``AutoscalingCluster`` cannot be used: the wheel lacks its example file, and it ends every Ray of the machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# The provider knows its head under this name alone.
HEAD_TYPE = "ray.head.default"


@dataclass(frozen=True)
class FakeCluster:
    """A running one.

    Attributes:
        address: of the head, host:port.
        env: of the head's process; a driver needs the same ``RAY_AUTH_*``.
    """

    address: str
    env: dict[str, str]


def _config(workers: dict[str, dict[str, Any]], head: dict[str, float], gcs: str, idle_s: float) -> dict[str, Any]:
    types = {
        name: {"node_config": {}, "min_workers": 0, **worker, "resources": {**worker["resources"]}}
        for name, worker in workers.items()
    }
    for worker in types.values():
        worker["resources"].setdefault("object_store_memory", 100 * 10**6)
    lists = ["initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"]
    return {
        "cluster_name": "fake",
        "max_workers": sum(worker["max_workers"] for worker in workers.values()),
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {HEAD_TYPE: {"resources": head, "node_config": {}, "max_workers": 0}, **types},
        "head_node_type": HEAD_TYPE,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": idle_s / 60,
        "auth": {},
        "docker": {},
        **{f"{name}_commands": [] for name in lists},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


@contextlib.contextmanager
def fake_cluster(
    workers: dict[str, dict[str, Any]], *, head_cpus: int = 0, idle_s: float = 4, **env: str
) -> Iterator[FakeCluster]:
    """Hold a head open whose autoscaler may start workers.

    Args:
        workers: node type → ``resources`` and ``max_workers``.
        head_cpus: of the head node.
        idle_s: a node that has been idle for so long is ended.
        env: variables of the head, ``RAY_AUTH_MODE`` above all.
    """
    # Short, because the paths of Ray's sockets may have 107 characters.
    temp = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    config = _config(workers, {"CPU": head_cpus}, address, idle_s)
    (temp / "cluster.yaml").write_text(yaml.safe_dump(config))
    env = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        **env,
    }
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"),
        *(f"--temp-dir={temp}", f"--num-cpus={head_cpus}", "--num-gpus=0"),
        *("--object-store-memory=200000000", f"--autoscaling-config={temp / 'cluster.yaml'}"),
        *("--include-dashboard=false", "--disable-usage-stats"),
    ]
    with (temp / "out").open("w") as out:
        # A session of its own: the processes of all its nodes are in one group, which is ended as a whole.
        head = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        _wait_for(head, port, temp / "out")
        yield FakeCluster(address, env)
    finally:
        _end(head)
        shutil.rmtree(temp, ignore_errors=True)


def _wait_for(head: subprocess.Popen[bytes], port: int, out: Path) -> None:
    for _ in range(300):
        if head.poll() is not None:
            raise RuntimeError(f"the head ended: {out.read_text()}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            if "Ray runtime started" in out.read_text():
                return
        time.sleep(0.2)
    raise RuntimeError(f"the head did not start: {out.read_text()}")


def _end(head: subprocess.Popen[bytes]) -> None:
    """End the group: politely, so that workers go before their raylets, and then for good."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGTERM)
        for _ in range(50):
            head.poll()
            os.killpg(head.pid, 0)
            time.sleep(0.1)
        os.killpg(head.pid, signal.SIGKILL)
    head.wait(10)
