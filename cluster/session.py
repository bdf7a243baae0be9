"""The Ray session of a run: started for it or attached to, with the settings that every stage relies on."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Nodes for a stage by itself are asked for by its actors that wait (``cluster.runner``). Ray Data would ask for more
# and hold on to them until the last unit of the stage is done; this one of its two ways to ask is made never to.
os.environ.setdefault("RAY_DATA_CLUSTER_SCALING_UP_UTIL_THRESHOLD", "1e9")
# Ray's C++ side writes its own errors to the terminal; failures reach users as sentences instead.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import ray
import ray.data
from ray._raylet import Config  # type: ignore[attr-defined]

from cluster.errors import INTERRUPTED, RunError, UserError, first_line
from cluster.resources import SessionOptions

OBJECT_STORE_MIN = 128 * 2**20
AUTH_MODE = "RAY_AUTH_MODE"


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
        UserError: ``address`` does not answer, or not to this driver.
        RunError: a private session does not start.
    """
    with contextlib.nullcontext() if ray.is_initialized() else _started(options):
        configure_data(options)
        try:
            yield
        except KeyboardInterrupt:
            # Here, for while trainers run in other threads Ray's shutdown may end the process on the spot.
            print(INTERRUPTED, file=sys.stderr, flush=True)
            raise SystemExit(1) from None


@contextlib.contextmanager
def _started(options: SessionOptions) -> Iterator[None]:
    """A session of our own."""
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if options.address is None:
        common |= {
            "num_cpus": options.num_cpus,
            "object_store_memory": _object_store_bytes(options),
            "include_dashboard": False,
            "_temp_dir": os.environ.get("RAY_TMPDIR") or os.path.join(tempfile.gettempdir(), "ray"),
        }
    with _auth_mode(options.address):
        try:
            try:
                with _silent_stderr():
                    ray.init(options.address or "local", **common)
            except Exception as error:
                if options.address is None:
                    raise RunError(
                        f"Ray could not start on this machine ({error}); is it overloaded? run again"
                    ) from None
                raise UserError(_unreachable(options.address, error)) from None
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _auth_mode(address: str | None) -> Iterator[None]:
    """Decide whether Ray asks for a token, where the user has not.

    A private session needs none, and one of another cluster in the user's home must not be demanded of it. With a
    running cluster a token that is given is used; without, ``ray.init`` does what it does for everybody.
    """
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    mode = "disabled" if address is None else "token" if given else None
    if mode is None or AUTH_MODE in os.environ:
        yield
        return
    os.environ[AUTH_MODE] = mode
    Config.initialize("")  # Ray read the mode when it was imported
    try:
        yield
    finally:
        del os.environ[AUTH_MODE]
        Config.initialize("")


def _unreachable(address: str, error: Exception) -> str:
    """Why a cluster cannot be used, and what to do."""
    reason = str(error)
    where = f"resources.session.address: the cluster at {address}"
    if "ersion mismatch" in reason:
        found = re.findall(r"(?:Ray|Python): (\S+)", reason)
        there, here = (" and Python ".join(found[i : i + 2]) for i in (0, 2))
        return f"{where} runs Ray {there}, this command Ray {here}; install the same versions in both places"
    if isinstance(error, ray.exceptions.AuthenticationError) or _listens(reason):
        return (
            f"{where} refuses this command, most likely for want of its token; set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH to the file with the token that `ray get-auth-token` shows on its head"
        )
    return (
        f"resources.session.address: no Ray cluster answers at {address} ({first_line(error)}); "
        "start one or leave the field out for a private session"
    )


def _listens(reason: str) -> bool:
    """Whether somebody is at the address that Ray failed to connect to; it does not tell refusal from silence."""
    found = re.search(r"cluster at (\S+):(\d+)", reason)
    if found:
        with contextlib.suppress(OSError), socket.create_connection((found[1], int(found[2])), timeout=5):
            return True
    return False


def configure_data(options: SessionOptions) -> None:
    """Ray Data settings of every stage."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = options.no_progress_timeout_s or -1
    context.arrow_fixed_shape_tensor_format = type(context.arrow_fixed_shape_tensor_format).ARROW_NATIVE
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What nodes tell every driver, as that they have many workers, would stand among the progress. No option turns it
    # off; Ray's own debugger does it so.
    ray._private.worker._worker_logs_enabled = False
