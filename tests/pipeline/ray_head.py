"""A Ray head of its own on the loopback, as a user would start it, ended by its process group alone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Ray's sockets have long names below it, and the system allows 107 characters.
SHORT_TMP = "/tmp"


@dataclass(frozen=True)
class Head:
    """Addresses of a running head."""

    address: str
    dashboard: str
    metrics: str
    env: dict[str, str]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _end_with_the_tests() -> None:
    """Tests that are killed cannot clean up; Linux then signals the head, which ends what it started."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def ray_head(cpus: int = 2) -> Iterator[Head]:
    """A head with a dashboard and so many logical CPUs."""
    gcs, dashboard, metrics = free_ports(3)
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="r", dir=SHORT_TMP, ignore_cleanup_errors=True) as folder:
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={gcs}", f"--num-cpus={cpus}", f"--object-store-memory={200 * 2**20}", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}",
            f"--temp-dir={folder}", "--disable-usage-stats",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=_end_with_the_tests,
        )  # fmt: skip
        try:
            for port in (gcs, dashboard):
                _wait_for(port, process)
            addresses = (f"http://127.0.0.1:{port}" for port in (dashboard, metrics))
            yield Head(f"127.0.0.1:{gcs}", *addresses, env)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"nothing listens on port {port}"
        time.sleep(0.2)
