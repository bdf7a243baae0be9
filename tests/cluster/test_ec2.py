"""Spot machines that EC2 refuses are bought on demand, within bounds: through Ray's launcher and its autoscaler."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mock_ec2 import FILE, ROOT, Head, ray_up

NONE_NOW = ("InsufficientInstanceCapacity", "There is no Spot capacity available that matches your request.")
NOT_HERE = (
    "Unsupported",
    "Your requested instance type (g5.2xlarge) is not supported in your requested Availability Zone (us-east-1a). "
    "Please retry your request by not specifying an Availability Zone or choosing us-east-1b.",
)
ZONES = yaml.safe_load((ROOT / FILE).read_text())["provider"]["availability_zone"].split(",")


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    with ray_up(tmp_path, monkeypatch) as head:
        yield head


def bounds(head: Head, **most: int) -> None:
    """Change the bounds in the file that the head reads, as ``ray up --no-restart`` does."""
    config = json.loads(head.config.read_text())
    for node_type, count in most.items():
        config["available_node_types"][node_type]["node_config"]["OnDemandFallback"] = count
    head.config.write_text(json.dumps(config))


def test_ray_has_no_such_fallback() -> None:
    """Why there is the provider: EC2 refuses at once, and only launches that time out make a type less wanted."""
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    for status, less_wanted in ((Instance.ALLOCATION_FAILED, set()), (Instance.ALLOCATION_TIMEOUT, {"gpu1"})):
        monitor.notify([InstanceUpdateEvent(new_instance_status=status, instance_type="gpu1")])
        assert set(monitor.get_recoverable_resource_availabilities()) == less_wanted


def test_spot_alone_while_there_is_some(head: Head) -> None:
    assert head.launch(gpu1=6, gpu4=1) == []
    assert {market for market, _, _ in head.market.asked} == {"spot"}
    assert (len(head.workers("gpu1")), len(head.workers("gpu4"))) == (6, 1)
    for machine in head.workers("gpu1") + head.workers("gpu4"):
        assert machine["InstanceLifecycle"] == "spot"
        assert "market" not in machine["Tags"]


@pytest.mark.parametrize(
    "said",
    [
        {"": NONE_NOW},
        {"": ("UnfulfillableCapacity", "At this time there isn't enough spare capacity to fulfill your request.")},
        {"": ("SpotMaxPriceTooLow", "Your Spot request price of 1.2 is lower than the minimum required.")},
        # One zone has no machines of the type at all; Ray's last try is there.
        {"": NONE_NOW, ZONES[0]: NOT_HERE},
    ],
    ids=["capacity", "unfulfillable", "price", "zone"],
)
def test_refused_in_all_zones_it_is_bought_on_demand(head, said, caplog) -> None:
    head.market.spot = said
    with caplog.at_level(logging.WARNING, "cluster.ec2"):
        assert head.launch(gpu1=2) == []
    assert {zone for market, zone, _ in head.market.asked if market == "spot"} == set(ZONES)
    assert head.market.asked[-1] == ("on-demand", ZONES[0], 2)
    first, second = head.workers("gpu1")
    for machine in (first, second):
        assert machine["InstanceType"] == "g5.2xlarge"
        assert machine.get("InstanceLifecycle") is None
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        # The guide's commands find it by the first two, Ray by the others.
        expected = {"market": "on-demand", "ray-cluster-name": "prism", "ray-node-type": "worker"}
        assert expected.items() <= machine["Tags"].items()
        assert machine["Tags"]["ray-launch-request"] == "request"
    (line,) = [record.getMessage() for record in caplog.records if record.name == "cluster.ec2"]
    assert line.startswith("EC2 refuses spot machines for gpu1 in all zones (")
    assert line.endswith("): starting 2 of 2 on demand, at most 2 at once.")


def test_never_more_than_the_bound(head) -> None:
    """Ray launches eight in two threads. A restarted autoscaler counts the machines of the one before."""
    head.market.spot = {"": NONE_NOW}
    errors = head.launch(gpu1=8)
    assert sum(error.count for error in errors) == 8
    assert {error.__cause__.category for error in errors} == {NONE_NOW[0]}
    assert len(head.workers("gpu1")) == 2
    head.restart()
    assert len(head.launch(gpu1=1)) == 1
    assert len(head.workers("gpu1")) == 2
    # Each type has its own.
    assert len(head.launch(gpu4=2)) == 1
    (large,) = head.workers("gpu4")
    assert large["InstanceType"] == "g5.12xlarge"
    # Room again, for spot machines do not count.
    head.ec2.terminate_instances(InstanceIds=[head.workers("gpu1")[0]["InstanceId"]])
    head.market.spot = {}
    assert head.launch(gpu1=3) == []
    head.market.spot = {"": NONE_NOW}
    assert head.launch(gpu1=1) == []
    assert len(head.launch(gpu1=1)) == 1
    markets = [machine["Tags"].get("market") for machine in head.workers("gpu1")]
    assert sorted(markets, key=str) == [None] * 3 + ["on-demand"] * 2


def test_the_bound_is_read_anew_before_each_launch(head) -> None:
    head.market.spot = {"": NONE_NOW}
    bounds(head, gpu1=0)
    assert len(head.launch(gpu1=1)) == 1
    assert not head.workers("gpu1")
    assert {market for market, _, _ in head.market.asked} == {"spot"}
    bounds(head, gpu1=1)
    assert head.launch(gpu1=1) == []
    bounds(head, gpu1=3)
    assert len(head.launch(gpu1=5)) == 1
    assert len(head.workers("gpu1")) == 3


def test_machines_that_ec2_does_not_list_yet_count(head, monkeypatch) -> None:
    from moto.core.responses import ActionResult
    from moto.ec2.responses.instances import InstanceResponse

    head.market.spot = {"": NONE_NOW}
    with monkeypatch.context() as behind:
        behind.setattr(InstanceResponse, "describe_instances", lambda response: ActionResult({"Reservations": []}))
        assert head.launch(gpu1=2) == []
        assert len(head.launch(gpu1=2)) == 1
    assert len(head.workers("gpu1")) == 2


def test_other_refusals_buy_nothing(head) -> None:
    for said in (
        ("MaxSpotInstanceCountExceeded", "Max spot instance count exceeded"),
        ("UnauthorizedOperation", "You are not authorized to perform this operation."),
        ("InvalidParameterValue", "Value for parameter is invalid"),
        ("Unsupported", "The requested configuration is currently not supported."),
    ):
        head.market.spot = {"": said}
        (error,) = head.launch(gpu1=1)
        assert (error.__cause__.category, error.__cause__.description) == said
    assert not head.workers("gpu1")
    assert {market for market, _, _ in head.market.asked} == {"spot"}


def test_on_demand_refused_too(head) -> None:
    head.market.spot = {"": NONE_NOW}
    head.market.on_demand = {"": ("VcpuLimitExceeded", "You have requested more vCPU capacity than your limit.")}
    (error,) = head.launch(gpu1=1)
    assert error.__cause__.category == "VcpuLimitExceeded"
    assert not head.workers("gpu1")


def test_of_a_launch_in_part_ray_asks_again_for_the_rest_alone(head) -> None:
    """Two of five are bought. Ray's instance manager has two machines then, and three failed launches."""
    from ray.autoscaler.v2.instance_manager.instance_manager import InstanceManager
    from ray.autoscaler.v2.instance_manager.instance_storage import InstanceStorage
    from ray.autoscaler.v2.instance_manager.reconciler import Reconciler
    from ray.autoscaler.v2.instance_manager.storage import InMemoryStorage
    from ray.core.generated.instance_manager_pb2 import (
        GetInstanceManagerStateRequest,
        Instance,
        InstanceUpdateEvent,
        UpdateInstanceManagerStateRequest,
    )

    manager = InstanceManager(InstanceStorage("prism", InMemoryStorage()), [])

    def update(version: int, status: int, **fields: object) -> None:
        events = [InstanceUpdateEvent(instance_id=str(i), new_instance_status=status, **fields) for i in range(5)]
        manager.update_instance_manager_state(
            UpdateInstanceManagerStateRequest(expected_version=version, updates=events)
        )

    update(0, Instance.QUEUED, instance_type="gpu1", upsert=True)
    update(1, Instance.REQUESTED, instance_type="gpu1", launch_request_id="request")
    head.market.spot = {"": NONE_NOW}
    errors = head.launch(gpu1=5)
    running = {k: v for k, v in head.adapter().get_non_terminated().items() if v.node_type == "gpu1"}
    Reconciler._handle_cloud_instance_allocation(manager, running, errors)
    state = manager.get_instance_manager_state(GetInstanceManagerStateRequest()).state
    found = [instance.status for instance in state.instances]
    assert sorted(found) == sorted([Instance.ALLOCATED] * 2 + [Instance.ALLOCATION_FAILED] * 3)


def test_rays_commands_find_the_cluster(head, tmp_path, monkeypatch) -> None:
    """As the guide uses them, with another ``ssh``; the last one ends all machines."""
    from ray.autoscaler._private import commands

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    head.market.spot = {"": NONE_NOW}
    head.launch(gpu1=2)
    assert len(head.machines()) == 3
    head.restart()
    commands.monitor_cluster(FILE, 100, None)
    commands.attach_cluster(FILE, start=False, use_screen=False, use_tmux=False, override_cluster_name=None)
    commands.exec_cluster(FILE, port_forward=[(8265, 8265)])  # ray dashboard
    commands.teardown_cluster(FILE, True, False, None, False)
    # Words that the stand-in for ssh was given, for other machines; nothing of them runs here.
    called = (tmp_path / "called").read_text()
    assert all(said in called for said in ("logs/monitor*", "bash", "8265:localhost:8265", "ray stop"))
    assert not head.machines()


def test_ray_does_not_fill_the_log_with_fields_that_nobody_wrote(head, caplog) -> None:
    """It reads the configuration every 5 s."""
    head.adapter()
    with caplog.at_level(logging.INFO):
        head.adapter()
    assert not caplog.records
