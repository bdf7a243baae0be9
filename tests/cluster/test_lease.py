"""One driver per run directory, by real processes and by made-up holders; on the local disk and on an S3 server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import RunError, UserError
from cluster.lease import LEASE_FILE, Lease, read_holder

ROOT = Path(__file__).resolve().parents[2]
BEAT = 0.1
DRIVER = """
import sys, time
from cluster.errors import RunError
from cluster.lease import Lease
with Lease(sys.argv[1], beat_s=0.1) as lease:
    print("holding", flush=True)
    try:
        with lease.guard():
            time.sleep(600)
    except RunError as error:
        print("error:", error, flush=True)
"""


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def out(request, tmp_path) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    return f"{request.getfixturevalue('s3_server')}/{uuid.uuid4().hex}"


@pytest.fixture
def driver(out):
    """A process that holds ``out``."""
    process = subprocess.Popen([sys.executable, "-c", DRIVER, out], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.communicate()


def holder(out: str, **values) -> None:
    """A lease file as another machine leaves it."""
    record = {
        "id": "other", "host": "node-7", "pid": 4242, "machine": "elsewhere", "process": "1", "since": 0.0,
        "beat_s": BEAT, "beat": 3, "time": 0.0,
    }  # fmt: skip
    storage.write_json(storage.join(out, LEASE_FILE), record | values)


def test_taken_kept_alive_and_released(out):
    with Lease(out, beat_s=BEAT) as lease:
        first = read_holder(out)
        assert first
        assert (first.pid, first.dead) == (os.getpid(), False)
        while read_holder(out).beat < first.beat + 2:  # type: ignore[union-attr]
            time.sleep(BEAT / 4)
        # As the pipeline does all the time; an object store's client remembers listings.
        storage.list_files(storage.join(out, "progress"))
        lease.check()
    assert read_holder(out) is None
    assert storage.list_files(storage.join(out, "progress")) == {}


def test_second_driver_is_refused_by_name_and_the_first_goes_on(out, driver):
    with pytest.raises(UserError) as refused, Lease(out, beat_s=BEAT):
        pass
    text = str(refused.value)
    assert text.startswith(f"out: {out} is being worked on by another driver (process {driver.pid} on {os.uname()[1]},")
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\); wait for it, stop it, or choose another out$", text)
    found = read_holder(out)
    assert found
    assert found.pid == driver.pid
    assert driver.poll() is None


def test_killed_driver_is_followed_without_a_wait(out, driver):
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    with Lease(out, beat_s=BEAT, say=pytest.fail):
        found = read_holder(out)
        assert found
        assert found.pid == os.getpid()


def test_process_id_given_again_is_another_process(out):
    with Lease(out, beat_s=BEAT):
        mine = read_holder(out)
    assert mine
    holder(out, machine=mine.machine, pid=mine.pid, process=mine.process)
    assert not read_holder(out).dead  # type: ignore[union-attr]
    holder(out, machine=mine.machine, pid=mine.pid, process="1")
    with Lease(out, beat_s=BEAT, say=pytest.fail):
        pass


def test_lease_of_another_machine_that_stands_still_is_taken_over(out):
    holder(out)
    said: list[str] = []
    with Lease(out, beat_s=BEAT, patience=3, say=said.append):
        found = read_holder(out)
        assert found
        assert found.pid == os.getpid()
    name = "process 4242 on node-7, since 1970-01-01 00:00:00 UTC"
    assert said == [f"{out} was left by {name}: watching for 0 s whether it still works"]


def test_clock_of_another_machine_does_not_matter(out):
    """A beat from the future is as dead as one from the past when it does not move."""
    holder(out, time=time.time() + 10**6, since=time.time() + 10**6)
    with Lease(out, beat_s=BEAT, patience=3):
        pass


def test_lease_of_another_machine_that_moves_is_respected(out):
    holder(out)
    stop = threading.Event()

    def beat() -> None:
        number = 3
        while not stop.wait(BEAT):
            number += 1
            holder(out, beat=number)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(UserError, match=r"another driver \(process 4242 on node-7"),
            Lease(out, beat_s=BEAT, patience=99),
        ):
            pass
    finally:
        stop.set()
        thread.join()
    assert read_holder(out).id == "other"  # type: ignore[union-attr]


def test_lease_that_is_released_while_it_is_watched_is_free(out):
    holder(out)
    with Lease(out, beat_s=BEAT, patience=10**6, say=lambda text: storage.remove(storage.join(out, LEASE_FILE))):
        assert read_holder(out).pid == os.getpid()  # type: ignore[union-attr]


def test_suspended_driver_is_taken_over_and_then_stops(out, driver):
    driver.send_signal(signal.SIGSTOP)
    with Lease(out, beat_s=BEAT, patience=10):
        driver.send_signal(signal.SIGCONT)
        text = driver.communicate(timeout=60)[0]
        assert text.startswith(f"error: out: {out} was taken over by another driver (process {os.getpid()} on ")
        found = read_holder(out)
        assert found
        assert found.pid == os.getpid()


def test_lost_lease_ends_the_body_and_leaves_the_others_file(out):
    def body() -> None:
        with Lease(out, beat_s=BEAT) as lease, lease.guard():
            holder(out)
            time.sleep(600)

    with pytest.raises(RunError, match="taken over by another driver") as lost:
        body()
    assert "process 4242 on node-7" in str(lost.value)
    assert read_holder(out).id == "other"  # type: ignore[union-attr]
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_ctrl_c_stays_ctrl_c_and_releases(out):
    lease = Lease(out, beat_s=BEAT)
    with pytest.raises(KeyboardInterrupt), lease, lease.guard():
        raise KeyboardInterrupt
    assert read_holder(out) is None


def test_storage_that_fails_for_a_while_costs_nothing(out, monkeypatch):
    failing = threading.Event()
    tried = []
    write = storage.write_json

    def flaky(uri: str, value: object) -> None:
        if failing.is_set():
            tried.append(uri)
            raise OSError("503 SlowDown")
        write(uri, value)

    monkeypatch.setattr(storage, "write_json", flaky)
    lease = Lease(out, beat_s=BEAT)
    with lease, lease.guard():
        failing.set()
        while len(tried) < 3:
            time.sleep(BEAT / 4)
        failing.clear()
        before = read_holder(out).beat  # type: ignore[union-attr]
        while read_holder(out).beat <= before + 3:  # type: ignore[union-attr]
            time.sleep(BEAT / 4)
    assert read_holder(out) is None


def test_storage_that_does_not_answer_is_not_a_free_lease(out, monkeypatch):
    def broken(uri: str) -> object:
        raise PermissionError("denied")

    monkeypatch.setattr(storage, "read_json", broken)
    with pytest.raises(PermissionError), Lease(out):
        pass


def test_file_of_another_kind_is_no_lease(out):
    storage.write_json(storage.join(out, LEASE_FILE), {"id": 1})
    with Lease(out, beat_s=BEAT, say=pytest.fail):
        pass
