"""One driver per run directory: a file with a heartbeat, judged by change.

Object stores need no conditional writes for this: of two drivers that write the file at the same time the last one
has it, and the other finds out at its next beat. Clocks of different machines are never compared; a second driver
watches the file for a few beats by its own clock.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cluster import storage
from cluster.errors import RunError, UserError

LEASE_FILE = "progress/driver.json"
BEAT_S = 5.0
# A driver that is alive misses some beats while it loads libraries or storage stalls.
PATIENCE_BEATS = 6
# Nothing of ours or Ray's uses it, while Ray Tune takes SIGUSR1 for itself; unlike Ctrl-C's it is not ignored in what a
# shell started in the background.
LOST_SIGNAL = signal.SIGUSR2


@dataclass(frozen=True)
class Holder:
    """A driver, as the lease file names it.

    Attributes:
        id: of this hold, unique.
        host, pid: for people.
        machine: kernel boot and process namespace, within which process ids mean something.
        process: start time of the process, since ids are given again; empty where the system does not say.
        since: when it took the run directory, seconds since 1970 by its clock.
        beat_s: seconds between two beats.
        beat: how many so far.
        time: of the last beat, by its clock; for people.
    """

    id: str
    host: str
    pid: int
    machine: str
    process: str
    since: float
    beat_s: float
    beat: int = 0
    time: float = 0.0

    def __str__(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"process {self.pid} on {self.host}, since {started}"

    @property
    def dead(self) -> bool:
        """Whether it ran on this machine and its process is gone; False where this cannot be known."""
        return self.machine == _machine() and _process_start(self.pid) != self.process


def read_holder(out: str) -> Holder | None:
    """Who has a run directory; None: nobody.

    Raises:
        OSError: storage does not answer, which is not the same.
    """
    try:
        return Holder(**storage.read_json(storage.join(out, LEASE_FILE)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        # Not a lease: someone's own file, or of another version.
        return None


def _machine() -> str:
    """This boot of this kernel and this process namespace; another container counts as another machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node()


def _process_start(pid: int) -> str | None:
    """When a process started, empty where the system does not say; None: there is none."""
    try:
        # After the name, which may hold spaces; field 22 of proc(5), and its state: a zombie does nothing any more.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


class Lease:
    """Holds a run directory for this driver.

    Args:
        out: the run directory.
        beat_s: seconds between two beats.
        patience: so many beats of the holder a lease must stand still before it is taken over.
        say: told in a sentence that a takeover is being waited for.
    """

    def __init__(
        self,
        out: str,
        beat_s: float = BEAT_S,
        patience: int = PATIENCE_BEATS,
        say: Callable[[str], None] = lambda text: None,
    ):
        self._out, self._uri = out, storage.join(out, LEASE_FILE)
        self._beat_s, self._patience, self._say = beat_s, patience, say
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._on_lost: Callable[[], None] = lambda: None
        self.lost: str = ""

    def __enter__(self) -> Lease:
        """Take the run directory and keep beating.

        Raises:
            UserError: another driver works on it.
        """
        found = read_holder(self._out)
        if found and not found.dead:
            self._watch(found)
        pid, now = os.getpid(), time.time()
        self._mine = Holder(
            uuid.uuid4().hex, platform.node(), pid, _machine(), _process_start(pid) or "", now, self._beat_s, time=now
        )
        self._write(0)
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the run directory free, if it is still this driver's; the second time does nothing."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        # What storage does not let us remove stands still, and is taken over.
        with contextlib.suppress(Exception):
            found = read_holder(self._out)
            if found and found.id == self._mine.id:
                storage.remove(self._uri)

    def check(self) -> None:
        """Stop here if the run directory is another's.

        Raises:
            RunError: says whose.
        """
        if self.lost:
            raise RunError(self.lost)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Release after the body, and end it when the lease is lost, wherever it waits.

        Raises:
            RunError: another driver took the run directory.
        """
        main = threading.current_thread() is threading.main_thread()

        def stop(number: int, frame: FrameType | None) -> None:
            # The one exception that Ray lets through wherever it waits.
            raise KeyboardInterrupt

        before: Any = None
        if main:
            before = signal.signal(LOST_SIGNAL, stop)
            thread = threading.get_ident()
            self._on_lost = lambda: signal.pthread_kill(thread, LOST_SIGNAL)
        try:
            self.check()
            yield
            self.check()
        except KeyboardInterrupt:
            self.check()
            raise
        finally:
            self._on_lost = lambda: None
            # First, since a signal without its handler would end the process.
            self.release()
            if main:
                signal.signal(LOST_SIGNAL, before)

    def _watch(self, found: Holder) -> None:
        """Wait until the lease is free or has stood still for long enough.

        Raises:
            UserError: it moves.
        """
        limit = self._patience * max(found.beat_s, self._beat_s)
        self._say(f"{self._out} was left by {found}: watching for {limit:.0f} s whether it still works")
        end = time.monotonic() + limit
        while time.monotonic() < end:
            time.sleep(min(self._beat_s, found.beat_s) / 4)
            now = read_holder(self._out)
            if now is None or now.dead:
                return
            if (now.id, now.beat) != (found.id, found.beat):
                raise UserError(
                    f"out: {self._out} is being worked on by another driver ({now}); wait for it, stop it, or choose "
                    "another out"
                )

    def _write(self, beat: int) -> None:
        storage.write_json(self._uri, asdict(self._mine) | {"beat": beat, "time": time.time()})

    def _keep(self) -> None:
        beat = 0
        # Soon for the first time: of two drivers that start at once one must learn so before it has done much.
        while not self._stop.wait(self._beat_s if beat else self._beat_s / 5):
            beat += 1
            # A storage that fails for long enough loses the lease, which the next beat that gets through finds out.
            with contextlib.suppress(Exception):
                found = read_holder(self._out)
                if found and found.id != self._mine.id:
                    self.lost = (
                        f"out: {self._out} was taken over by another driver ({found}) while this one stood still or "
                        "could not reach it; this one stops, and what it finished is kept"
                    )
                    self._on_lost()
                    return
                self._write(beat)
