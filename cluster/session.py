"""The Ray session of a run: started for it or attached to, with the settings that every stage relies on."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

# Read by Ray at import. A private local session needs no token, and a token file of another
# cluster in the user's home must not be demanded of it.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray's C++ side writes its own errors to the terminal; failures reach users as sentences instead.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import ray
import ray.data

from cluster.errors import INTERRUPTED, RunError, UserError
from cluster.resources import Frozen

OBJECT_STORE_MIN = 128 * 2**20


class SessionOptions(Frozen):
    """How to reach Ray.

    Attributes:
        address: None starts a private session on this machine; else a running cluster (``auto`` or host:port).
        num_cpus: logical CPUs of a private session. None: those of the machine.
        object_store_mb: object store of a private session. None: an eighth of the memory, at most 2 GiB, since
            images and weights do not pass through it.
        no_progress_timeout_s: a Ray Data stage that finishes nothing for so long is ended. Must exceed the
            longest unit.
    """

    address: str | None = None
    num_cpus: int | None = None
    object_store_mb: int | None = None
    no_progress_timeout_s: int = 6 * 3600


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep the line away in which Ray's C++ side announces the log level above."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _object_store_bytes(options: SessionOptions) -> int:
    if options.object_store_mb is not None:
        return max(OBJECT_STORE_MIN, options.object_store_mb * 2**20)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(max(OBJECT_STORE_MIN, min(memory // 8, 2 * 2**30)))


@contextlib.contextmanager
def ray_session(options: SessionOptions) -> Iterator[None]:
    """Hold a Ray session open. One that the caller already has is used and left running.

    Raises:
        UserError: ``address`` does not answer.
        RunError: a private session does not start.
    """
    owned = not ray.is_initialized()
    if owned:
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        if options.address is None:
            common |= {
                "num_cpus": options.num_cpus,
                "object_store_memory": _object_store_bytes(options),
                "include_dashboard": False,
                "_temp_dir": os.environ.get("RAY_TMPDIR") or os.path.join(tempfile.gettempdir(), "ray"),
            }
        try:
            with _silent_stderr():
                ray.init(options.address or "local", **common)
        except Exception as error:
            if options.address is None:
                raise RunError(f"Ray could not start on this machine ({error}); is it overloaded? run again") from None
            raise UserError(
                f"resources.session.address: no Ray cluster answers at {options.address} ({error}); "
                "start one or leave the field out for a private session"
            ) from None
    configure_data(options)
    try:
        yield
    except KeyboardInterrupt:
        # Here, for while trainers run in other threads Ray's shutdown may end the process on the spot.
        print(INTERRUPTED, file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    finally:
        if owned:
            ray.shutdown()


def configure_data(options: SessionOptions) -> None:
    """Ray Data settings of every stage."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = options.no_progress_timeout_s
    context.arrow_fixed_shape_tensor_format = type(context.arrow_fixed_shape_tensor_format).ARROW_NATIVE
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What nodes tell every driver, as that they have many workers, would stand among the progress. No option turns it
    # off; Ray's own debugger does it so.
    ray._private.worker._worker_logs_enabled = False


def cluster_totals() -> tuple[float, float]:
    """(CPUs, GPUs) of the running cluster."""
    totals = ray.cluster_resources()
    return float(totals.get("CPU", 0)), float(totals.get("GPU", 0))
