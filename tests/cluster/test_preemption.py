"""SIGTERM as a notice: heeded by Ray's workers alone, without hurry while a unit is in work; and who passes it on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import preemption

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import os, signal, sys, time
from cluster import preemption
preemption.is_worker = lambda: True
preemption._register = lambda: None
def before(number, frame):
    print("as before", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, before)
assert preemption.listen()
"""


def test_a_users_own_process_keeps_its_signals() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert not preemption.listen()
    assert signal.getsignal(signal.SIGTERM) is before
    with preemption.busy():
        pass


def run(body: str) -> tuple[int, str]:
    script = WORKER + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert not done.stderr
    return done.returncode, done.stdout


def test_an_idle_worker_ends_as_before() -> None:
    assert run("os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)") == (7, "as before\n")


def test_a_busy_one_finishes_what_it_is_at() -> None:
    code, text = run(
        """
        with preemption.busy():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            print(preemption.noticed(), flush=True)
        print("not reached", flush=True)
        """
    )
    assert (code, text) == (1, "True\n")


def test_units_one_after_the_other_go_on_without_a_notice() -> None:
    assert run(
        """
        for _ in range(2):
            with preemption.busy():
                assert not preemption.noticed()
        print("done", flush=True)
        """
    ) == (0, "done\n")


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that are registered as workers of a node; ``stubborn`` ones stay."""
    monkeypatch.setattr(preemption, "_folder", lambda: tmp_path)
    started = []

    def start(node: str, stubborn: bool = False) -> subprocess.Popen[str]:
        script = f"""
import fcntl, json, os, signal, time
file = open({str(tmp_path)!r} + f"/{{os.getpid()}}.json", "w")
fcntl.flock(file, fcntl.LOCK_EX)
json.dump({{"node": {node!r}, "address": "h:1"}}, file)
file.flush()
{"signal.signal(signal.SIGTERM, signal.SIG_IGN)" if stubborn else ""}
print("ready", flush=True)
time.sleep(60)
"""
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def drained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nodes that Ray was told to drain."""
    found: list[str] = []

    def ran(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        assert command[3] == "drain-node"
        found.append(command[command.index("--node-id") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", ran)
    return found


def test_all_workers_of_a_machine_are_told(workers: Any, drained: list[str]) -> None:
    first, second, third = workers("n1"), workers("n1"), workers("n2")
    assert preemption.notify(10, "n1") == (2, 0)
    assert (drained, first.wait(), second.wait(), third.poll()) == (["n1"], -15, -15, None)
    assert preemption.notify(10) == (1, 0)
    assert (drained, third.wait()) == (["n1", "n2"], -15)
    assert preemption.notify(10) == (0, 0)


def test_those_that_stay_are_counted(workers: Any, drained: list[str]) -> None:
    stays = workers("n1", stubborn=True)
    workers("n1")
    assert preemption.notify(0.5) == (2, 1)
    assert stays.poll() is None


def test_a_dead_workers_registration_deceives_nobody(workers: Any, drained: list[str], tmp_path: Path) -> None:
    """Its process id may have been given to another process, here this one."""
    (tmp_path / f"{os.getpid()}.json").write_text('{"node": "n1", "address": "h:1"}')
    assert preemption.notify(1) == (0, 0)
    assert not list(tmp_path.iterdir())


def test_the_command_says_how_it_went(workers: Any, drained: list[str], monkeypatch: Any, capsys: Any) -> None:
    workers("n1")
    monkeypatch.setattr(sys, "argv", ["preemption", "--timeout", "10"])
    with pytest.raises(SystemExit) as stop:
        preemption.main()
    assert (stop.value.code, capsys.readouterr().out) == (0, "1 workers told, 1 ended\n")
