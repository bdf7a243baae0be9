"""Watching work that blocks the driver, through the files that its workers write."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from cluster import storage
from cluster.errors import PrismError
from cluster.metrics import DriverMetrics
from cluster.progress import StageProgress, read_progress
from cluster.record import RecordWriter


@contextlib.contextmanager
def follow(uri: str, title: str, total: float, unit: str) -> Iterator[None]:
    """Show and record the sum of a progress folder while the body blocks (a trainer's ``fit``)."""
    stop = threading.Event()
    metrics = DriverMetrics(uri.rpartition("/")[2])
    with StageProgress(title, total, unit) as shown, RecordWriter(uri, unit, total) as writer:

        def poll() -> None:
            while not stop.wait(1.0 if storage.is_local(uri) else 10.0):
                try_update()

        def try_update() -> None:
            # What is only shown ends nothing: storage may be away for a while.
            with contextlib.suppress(OSError, PrismError):
                shown_update()

        def shown_update() -> None:
            records = read_progress(uri)
            if records:
                latest = max(records.values(), key=lambda r: r["time"])
                done = sum(r["done"] for r in records.values())
                shown.set(done, latest["message"])
                spent = [sum(r["seconds"] * r.get(kind, 0) for r in records.values()) for kind in ("gpus", "cpus")]
                writer.move(done, *spent)
                metrics.update(writer.record)

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            try_update()
