"""Notice that a machine is about to be taken away: SIGTERM to a worker, on which it keeps its work and ends.

What Ray 2.60 does, found by experiment:

- The constructor of a Ray Data actor runs in the main thread of its process, so a handler can be set there. Rows are
  worked on in another thread, while the main thread waits in Ray's loop and runs handlers within milliseconds. So it
  is enough that a handler sets a flag, at which the loop over the steps looks.
- Ray's own handler raises ``SystemExit`` in the main thread. Ray takes the actor for dead at once and starts the row
  elsewhere, while the old process works it to its end for nothing. The handler stays in force while no unit is being
  worked on, since Ray ends idle actors in this way.
- A raylet that gets SIGTERM kills its workers within 20 ms; they are not told, and could not do anything about it.
  So a machine's own notice has to reach the workers before Ray stops: ``python -m cluster.preemption`` does that, from
  a container's preStop hook or whatever watches for the notice of a spot machine.
- A process that ends by ``os._exit`` is restarted by Ray, elsewhere where there is room, and gets its row again. (After
  ``ray.actor.exit_actor`` it would not be.)
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

_noticed = threading.Event()
_busy = threading.Event()


def listen() -> bool:
    """Heed SIGTERM from now on, where this process is a worker of Ray and this its main thread.

    Elsewhere, in a user's own process above all, signals keep their meaning.

    Returns:
        Whether it does.
    """
    if threading.current_thread() is not threading.main_thread() or not is_worker():
        return False
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        _noticed.set()
        if not _busy.is_set() and callable(before):
            before(number, frame)

    signal.signal(signal.SIGTERM, handle)
    _register()
    return True


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Hold on to the process in spite of a notice while the body works; it looks at ``noticed``, or ends soon."""
    _busy.set()
    try:
        yield
    finally:
        _busy.clear()
        if _noticed.is_set():
            leave()


def noticed() -> bool:
    """Whether this process has been told to end."""
    return _noticed.is_set()


def leave() -> NoReturn:
    """End this process, so that Ray moves its unit elsewhere."""
    sys.stderr.flush()
    os._exit(1)


def is_worker() -> bool:
    """Whether this process is one that Ray started for its work."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"prism-workers-{os.getuid()}"


# Held open, and with it locked, as long as the process lives; so a process id that was used again deceives nobody.
_registration: list[TextIO] = []


def _register() -> None:
    """Let ``notify`` find this process and its Ray node."""
    import ray

    context = ray.get_runtime_context()
    _folder().mkdir(mode=0o700, exist_ok=True)
    if not _own_folder():
        return
    file = (_folder() / f"{os.getpid()}.json").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    json.dump({"node": context.get_node_id(), "address": context.gcs_address}, file)
    file.flush()
    _registration.append(file)


def _own_folder() -> bool:
    """Whether the folder of registrations is ours alone; one that another user made could name any process."""
    try:
        found = _folder().lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _registered() -> dict[int, dict[str, str]]:
    """Process id → Ray node and address, of the living workers of this machine and user."""
    found: dict[int, dict[str, str]] = {}
    if not _own_folder():
        return found
    for path in _folder().glob("*.json"):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with contextlib.suppress(ValueError):
                    found[int(path.stem)] = json.load(file)
            else:
                path.unlink(missing_ok=True)
    return found


def notify(timeout_s: float, node: str | None = None) -> tuple[int, int]:
    """Tell the workers of this machine to keep their work and end, and wait until they have.

    Before that, Ray is told that the machine will be gone, so that it starts nothing here any more.

    Args:
        timeout_s: longest wait.
        node: id of the only Ray node that is meant, where a machine has several.

    Returns:
        Workers told, and those of them that still live.
    """
    workers = {pid: w for pid, w in _registered().items() if node in (None, w["node"])}
    for name, address in {(w["node"], w["address"]) for w in workers.values()}:
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", name]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "notice of preemption"]
        command += ["--deadline-remaining-seconds", str(math.ceil(timeout_s))]
        try:
            # A head that is gone or busy must not use up the time that the workers need.
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s / 4)
            reason = done.stderr.strip()[-300:] if done.returncode else ""
        except subprocess.TimeoutExpired:
            reason = "no answer"
        if reason:
            print(f"warning: Ray does not drain {name}: {reason}", file=sys.stderr)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + timeout_s
    while (left := workers.keys() & _registered().keys()) and time.monotonic() < end:
        time.sleep(0.2)
    return len(workers), len(left)


def main() -> None:
    """Command line of ``notify``."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.preemption",
        description="Tell the recovery workers of this machine to keep their work and end, before the machine goes.",
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="longest wait, seconds")
    told, left = notify(parser.parse_args().timeout)
    print(f"{told} workers told, {told - left} ended")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
