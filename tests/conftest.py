"""Fixtures shared by all tests: small real-looking data, and one Ray session for the tests that need it."""

from __future__ import annotations

import logging
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
def s3_server() -> Iterator[str]:
    """An S3 server on the loopback, named by the environment as a user would; yields ``s3://BUCKET``."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_PROFILE", raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        boto3.client("s3").create_bucket(Bucket="prism-tests")
        yield "s3://prism-tests"
    server.stop()


@pytest.fixture(scope="session")
def ray_local(s3_server: str) -> Iterator[None]:
    """A private two-CPU Ray session; its workers inherit the environment that names the S3 server."""
    from cluster.session import SessionOptions, ray_session

    with ray_session(SessionOptions(num_cpus=2, object_store_mb=200, no_progress_timeout_s=120)):
        yield
