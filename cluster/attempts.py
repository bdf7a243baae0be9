"""How often a unit may lose its worker.

Ray starts a unit again, elsewhere, whenever its worker or its machine dies, and does so without end: a unit that takes
more memory than there is would kill workers for ever. So every start leaves a record before the work begins, and who
finds too many of them gives the unit up.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from cluster import storage
from cluster.errors import RunError
from cluster.progress import ProgressWriter

# Starts of a unit in one session, each of which ended with its worker.
MAX_ATTEMPTS = 3


class Attempt:
    """One start of a unit; its record also tells how far the unit is.

    Attributes:
        number: starts of the unit over all sessions, this one included.
    """

    def __init__(self, writer: ProgressWriter, task: str, total: float, record: Mapping[str, Any]):
        self._writer, self._task, self._total, self._record = writer, task, total, dict(record)
        self.number: int = record["attempt"]

    def update(self, done: float) -> None:
        """Record progress, now and then; the end is recorded by ``finish``."""
        if done < self._total:
            self._writer.update(done, self._total, self._task, **self._record)

    def finish(self) -> None:
        """The unit is committed."""
        self._writer.update(self._total, self._total, self._task, **self._record)

    def excuse(self, done: float) -> None:
        """The worker is about to end through no fault of the unit: this start does not count."""
        self._record["session_attempt"] -= 1
        self._writer.update(done, self._total, self._task, force=True, **self._record)


class Attempts:
    """Start records of the units of one stage.

    Args:
        uri: folder of the records, one JSON file a unit.
        session: tells this run's starts from those of an earlier, interrupted one, which count no more.
        remedy: for the error, "lower …".
        seed: of the run, for the error, where units have none of their own.
        interval_s: shortest time between two records of progress.
        key: what all units are made from, where they have no keys of their own.
    """

    def __init__(self, uri: str, session: str, remedy: str, seed: int = 0, interval_s: float = 5.0, key: str = ""):
        self._uri, self._session, self._remedy, self._interval = uri, session, remedy, interval_s
        self._seed, self._key = seed, key

    def clear(self) -> None:
        """Remove the records of a stage that is complete."""
        storage.remove_files(self._uri, list(storage.list_files(self._uri, ".json")))

    def begun(self, task: str) -> bool:
        """Whether this session has started the unit before."""
        return bool(self._last(task).get("session") == self._session)

    def begin(self, task: str, total: float, what: str = "", *, done: float = 0, key: str = "") -> Attempt:
        """Record a start, before anything can end it.

        A start that finds the unit further than the one before did is counted from one again: what gets on will end.
        So is one after the unit was finished, for which Ray asks when the result was lost with a machine.

        Args:
            task: file-safe name of the unit.
            total: of its progress.
            what: names the unit and its seed, for the error; empty: by ``task`` and the run's seed.
            done: progress from which this start goes on.
            key: what the unit is made from; starts of another content are forgotten.

        Raises:
            RunError: the unit lost its worker too often.
        """
        last, key = self._last(task), key or self._key
        if last.get("key") != key:
            last = {}
        again = last.get("session") == self._session and last["done"] < last["total"] and done <= last["from"]
        here = last["session_attempt"] + 1 if again else 1
        if here > MAX_ATTEMPTS:
            raise RunError(
                f"{what or f'{task} (seed {self._seed})'} lost its worker {MAX_ATTEMPTS} times, most likely for want "
                f"of memory; {self._remedy}, or run the same command again if its machines went away"
            )
        record = {
            "attempt": last.get("attempt", 0) + 1,
            "session": self._session,
            "session_attempt": here,
            "from": done,
            "key": key,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        writer = ProgressWriter(self._uri, task, self._interval)
        writer.update(done, total, task, force=True, **record)
        return Attempt(writer, task, total, record)

    def finish(self, task: str) -> int:
        """Record that a unit turned out to be committed, where its worker had no time to; returns its starts."""
        last = self._last(task)
        if last and last["done"] < last["total"]:
            storage.write_json(storage.join(self._uri, f"{task}.json"), {**last, "done": last["total"]})
        # The record may be out of reach for a moment; the unit is committed all the same.
        return int(last.get("attempt", 1))

    def _last(self, task: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = storage.read_json(storage.join(self._uri, f"{task}.json"))
        except (OSError, ValueError):
            return {}
        return found
