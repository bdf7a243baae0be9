"""Fixtures shared by all tests: small real-looking data, and one Ray session for the tests that need it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# A user's own Ray cluster must neither be found nor used by tests.
os.environ.pop("RAY_ADDRESS", None)
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED = Path(os.environ.get("PRISM_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real datasets and checkpoints; tests that need them skip where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no test data at {SHARED} (set PRISM_TEST_DATA)")
    return SHARED


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A private two-CPU Ray session."""
    from cluster.session import SessionOptions, ray_session

    with ray_session(SessionOptions(num_cpus=2, object_store_mb=200, no_progress_timeout_s=120)):
        yield
