"""Fixtures shared by all tests: small real-looking data, and one Ray session for the tests that need it."""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from s3 import swift
from s3.fault_proxy import FaultProxy
from s3.stores import STORES

# A user's own Ray cluster must neither be found nor used by tests.
os.environ.pop("RAY_ADDRESS", None)
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray's workers inherit it: what tests decode and fetch must not stay in the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="prism-tests-")
os.environ["PRISM_CACHE"] = os.path.join(_CACHE.name, "cache")

# A property does not fail because the machine has other work.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

SHARED = Path(os.environ.get("PRISM_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where the command says nothing of time, long tests get what they need."""
    for item in items if config.getoption("timeout") is None else ():
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


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
        boto3.Session().client("s3").create_bucket(Bucket="prism-tests")
        yield "s3://prism-tests"
    server.stop()


@pytest.fixture(scope="session")
def swift_server(tmp_path_factory) -> Iterator[dict[str, str]]:
    """OpenStack Swift with its S3 API; yields the environment that names it. PRISM_SWIFT keeps its installation."""
    if swift.unavailable():
        pytest.skip(swift.unavailable())
    root = tmp_path_factory.mktemp("swift")
    with ExitStack() as stack:
        programs = swift.install(Path(os.environ.get("PRISM_SWIFT") or root / "venv"))
        yield swift.start(programs, root / "store", stack)


@pytest.fixture
def open_store(request, monkeypatch) -> Iterator[Callable[[str], str]]:
    """Makes an empty bucket on moto or on Swift and lets the environment name its server; returns ``s3://BUCKET``."""
    import boto3

    from cluster.objectstore import ObjectStore

    def open_(kind: str) -> str:
        if kind == "moto":
            request.getfixturevalue("s3_server")
        else:
            for name, value in request.getfixturevalue("swift_server").items():
                monkeypatch.setenv(name, value)
            monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        # The address is read when the first of its objects is made.
        ObjectStore.clear_instance_cache()
        bucket = f"prism-{uuid.uuid4().hex}"
        boto3.Session().client("s3").create_bucket(Bucket=bucket)
        return f"s3://{bucket}"

    yield open_
    ObjectStore.clear_instance_cache()


@pytest.fixture(params=STORES)
def s3_store(request, open_store) -> str:
    """``s3://BUCKET`` on moto, and under the marker ``s3_real`` on a real object store; empty for every test."""
    return open_store(request.param)


@pytest.fixture
def fault_proxy(s3_store, monkeypatch) -> Iterator[Callable[..., FaultProxy]]:
    """Puts a proxy with the given faults before ``s3_store``; returns it."""
    from cluster.objectstore import ObjectStore

    with ExitStack() as stack:

        def make(**options) -> FaultProxy:
            proxy = FaultProxy(os.environ["AWS_ENDPOINT_URL"], **options)
            stack.callback(proxy.close)
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            ObjectStore.clear_instance_cache()
            return proxy

        yield make


@pytest.fixture(scope="session")
def ray_local(s3_server: str) -> Iterator[None]:
    """A private two-CPU Ray session; its workers inherit the environment that names the S3 server."""
    from cluster.resources import SessionOptions
    from cluster.session import ray_session

    with ray_session(SessionOptions(num_cpus=2, object_store_mb=200, no_progress_timeout_s=120)):
        yield


@pytest.fixture
def start_machines() -> Iterator[Callable[..., tuple[str, list[Any]]]]:
    """Starts a Ray cluster of machines that are processes of this one, with so many CPUs and GPUs each.

    Beside them is a head without any. Returns its address and the machines.
    """
    from ray.cluster_utils import Cluster

    with ExitStack() as stack:

        def start(*machines: tuple[int, int]) -> tuple[str, list[Any]]:
            small = {"object_store_memory": 100 * 2**20}
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
            stack.callback(cluster.shutdown)
            own = [cluster.add_node(wait=False, num_cpus=cpus, num_gpus=gpus, **small) for cpus, gpus in machines]
            cluster.wait_for_nodes(120)
            return cluster.address, own

        yield start
