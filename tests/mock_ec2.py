"""``ray up`` with the repository's file on a mock EC2, and then what the head's autoscaler does there."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILE = "ray_cluster.yaml"
LIVE = {"Name": "instance-state-name", "Values": ["pending", "running"]}


class Recorded:
    """Stands for ``subprocess``: keeps the SSH and rsync commands that the launcher would run."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.head_config: dict[str, Any] = {}

    def _run(self, command: list[str], *args: Any, **kwargs: Any) -> bytes:
        self.commands.append(" ".join(command))
        if command[0] == "rsync" and command[-1].endswith("ray_bootstrap_config.yaml"):
            self.head_config = json.loads(Path(command[-2]).read_text())
        return b""

    check_call = check_output = call = _run


@dataclass
class Market:
    """What EC2 sells.

    Attributes:
        spot, on_demand: code and message of the refusal, by zone; that of ``""`` is for all others.
        asked: market, zone and number of machines of every call.
    """

    spot: dict[str, tuple[str, str]] = field(default_factory=dict)
    on_demand: dict[str, tuple[str, str]] = field(default_factory=dict)
    asked: list[tuple[str, str, int]] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts it into the mock, which itself refuses nothing and starts the smallest number that the caller takes."""
        from moto.ec2.exceptions import EC2ClientError
        from moto.ec2.responses.instances import InstanceResponse

        sell = InstanceResponse.run_instances

        def run_instances(response: Any) -> Any:
            zone = response.ec2_backend.get_subnet(response._get_param("SubnetId")).availability_zone
            market = response._get_param("InstanceMarketOptions.MarketType") or "on-demand"
            count = int(response._get_param("MaxCount"))
            self.asked.append((market, zone, count))
            refusals = self.spot if market == "spot" else self.on_demand
            refusal = refusals.get(zone) or refusals.get("")
            if refusal:
                raise EC2ClientError(*refusal)
            response.params["MinCount"] = count
            return sell(response)

        monkeypatch.setattr(InstanceResponse, "run_instances", run_instances)


@dataclass
class Head:
    """A cluster after ``ray up``.

    Attributes:
        recorded: the commands that were run for it.
        config: file that the head's autoscaler reads.
        ec2: client of the mock.
        market: what it sells from now on.
    """

    recorded: Recorded
    config: Path
    ec2: Any
    market: Market

    def launch(self, **shape: int) -> list[Any]:
        """Start machines, type → number, as the autoscaler does; returns its errors."""
        adapter = self.adapter()
        adapter.launch(shape, "request")
        adapter._main_executor.shutdown()
        adapter._node_launcher_executors.shutdown()
        return adapter.poll_errors()

    def adapter(self) -> Any:
        """What the autoscaler starts machines with, from the file that it reads; the provider lasts until a restart."""
        from ray.autoscaler.v2.autoscaler import Autoscaler
        from ray.autoscaler.v2.instance_manager.config import FileConfigReader

        reader = FileConfigReader(str(self.config))
        autoscaler = Autoscaler.__new__(Autoscaler)  # without the head's other services
        autoscaler._init_cloud_instance_provider(reader.get_cached_autoscaling_config(), reader)
        return autoscaler._cloud_instance_provider

    def restart(self) -> None:
        """The autoscaler is another process."""
        from ray.autoscaler._private.providers import _clear_provider_cache

        _clear_provider_cache()

    def machines(self) -> list[dict[str, Any]]:
        """Those that run, as EC2 tells them, with ``Tags`` as a mapping."""
        found = self.ec2.describe_instances(Filters=[LIVE])["Reservations"]
        machines = [machine for reservation in found for machine in reservation["Instances"]]
        return [{**m, "Tags": {tag["Key"]: tag["Value"] for tag in m["Tags"]}} for m in machines]

    def workers(self, node_type: str) -> list[dict[str, Any]]:
        """Those of one type."""
        return [machine for machine in self.machines() if machine["Tags"]["ray-user-node-type"] == node_type]


@contextlib.contextmanager
def ray_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    """Hold a cluster of the repository's file open, started by Ray's own launcher; only its commands do not run."""
    moto = pytest.importorskip("moto")
    import boto3
    from ray.autoscaler._private import commands, updater
    from ray.autoscaler._private.aws import node_provider
    from ray.autoscaler._private.aws.utils import resource_cache
    from ray.autoscaler._private.providers import _clear_provider_cache

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(home))  # where the launcher keeps what it resolved
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "mock")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for module in (commands, updater):
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("sesame")
    (home / "ray_bootstrap_key.pem").write_text("key")  # as rsync would have put it onto the head
    resource_cache.cache_clear()
    _clear_provider_cache()
    market = Market()
    market.install(monkeypatch)
    cluster = yaml.safe_load((ROOT / FILE).read_text())
    region = cluster["provider"]["region"]
    # An account of its own, and nothing is reset: the S3 server of other tests keeps its buckets in the same mock.
    monkeypatch.setenv("MOTO_ACCOUNT_ID", f"{random.randrange(10**12):012d}")
    mock = moto.mock_aws()
    mock.start(reset=False)
    try:
        iam = boto3.client("iam", region_name=region)
        for name in ("prism-head", "prism-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        # Of the mock's thousand instance types, those of the file: listing all takes seconds.
        asked = [t["node_config"]["InstanceType"] for t in cluster["available_node_types"].values()]
        ec2 = boto3.client("ec2", region_name=region)
        known = ec2.describe_instance_types(InstanceTypes=sorted(set(asked)))["InstanceTypes"]
        monkeypatch.setattr(node_provider, "list_ec2_instances", lambda region, credentials: known)
        recorded = Recorded()
        config = commands._bootstrap_config(cluster, no_config_cache=True)
        commands.get_or_create_head_node(config, FILE, False, False, True, None, _runner=recorded)
        (home / "ray_bootstrap_config.yaml").write_text(json.dumps(recorded.head_config))
        market.asked.clear()
        _clear_provider_cache()  # the head is another machine
        yield Head(recorded, home / "ray_bootstrap_config.yaml", ec2, market)
    finally:
        mock.stop(remove_data=False)
    resource_cache.cache_clear()
    _clear_provider_cache()
