"""The cluster file is valid by Ray's own schema, keeps the safe settings, and starts what it says on a mock EC2."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def workers(cluster: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in cluster["available_node_types"].items() if k != cluster["head_node_type"]}


def is_spot(node_type: dict[str, Any]) -> bool:
    return node_type["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"


def validate(cluster: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_valid_by_rays_schema(cluster):
    validate(cluster)


@pytest.mark.parametrize(
    ("place", "key", "value", "said"),
    [
        ((), "max_wrkers", 3, "max_wrkers"),
        ((), "head_node_type", "haed", "head_node_type"),
        (("available_node_types", "gpu1_spot"), "prority", 1, "prority"),
        (("available_node_types", "gpu1_spot", "resources"), "GPU", 0.5, "0.5 is not of type 'integer'"),
        (("available_node_types", "gpu4_spot"), "max_workers", "four", "'four' is not of type 'integer'"),
    ],
)
def test_ray_refuses_what_is_not_in_the_schema(cluster, place, key, value, said):
    section = cluster
    for name in place:
        section = section[name]
    section[key] = value
    with pytest.raises(Exception, match=said):
        validate(cluster)


def test_head_runs_no_work_and_is_bought_on_demand(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert not is_spot(head)


def test_spot_workers_of_two_sizes_start_at_zero(cluster):
    assert all(w["min_workers"] == 0 for w in workers(cluster).values())
    sizes = {w["resources"]["GPU"] for w in workers(cluster).values() if is_spot(w)}
    assert sizes == {1, 4}
    assert cluster["max_workers"] == sum(w["max_workers"] for w in workers(cluster).values())
    assert not any("MaxPrice" in str(w) for w in workers(cluster).values())


def test_on_demand_type_differs_from_a_spot_type_in_price_alone(cluster):
    """Autoscaler v2 reads the priority only between types that score alike."""
    (fallback,) = [w for w in workers(cluster).values() if not is_spot(w)]
    twins = [w for w in workers(cluster).values() if is_spot(w) and w["resources"] == fallback["resources"]]
    assert twins
    for twin in twins:
        assert fallback["priority"] < twin["priority"]
        bought = {k: v for k, v in twin["node_config"].items() if k != "InstanceMarketOptions"}
        assert bought == fallback["node_config"]


def test_spot_is_looked_for_in_several_zones_of_the_region(cluster):
    zones = cluster["provider"]["availability_zone"].split(",")
    assert len(set(zones)) >= 3
    assert all(zone.startswith(cluster["provider"]["region"]) for zone in zones)
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_nothing_is_open_and_everything_asks_for_the_token(cluster):
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert "0.0.0.0" not in str(cluster)
    assert "--dashboard-host=127.0.0.1" in " ".join(cluster["head_start_ray_commands"])
    assert all("RAY_AUTH_MODE=token" in start for start in starts if "ray start" in start)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_credentials_come_from_instance_profiles(cluster):
    for node_type in cluster["available_node_types"].values():
        assert node_type["node_config"]["IamInstanceProfile"].keys() == {"Name"}
        assert node_type["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
    assert not re.search("AWS_(ACCESS|SECRET|SESSION|PROFILE)", str(cluster))
    regions = re.findall(r"AWS_DEFAULT_REGION=([\w-]+)", str(cluster["setup_commands"]))
    assert regions == [cluster["provider"]["region"]]


def test_the_nodes_install_what_they_are_sent(cluster):
    """Everything that the build names is mounted, nothing else of the folder; Ray is the pinned version."""
    import ray

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    needed = packages | {project["project"]["readme"], *project["project"]["license-files"]}
    mounts = {k.removeprefix("~/prism/"): v for k, v in cluster["file_mounts"].items() if k.startswith("~/prism/")}
    assert needed | {"pyproject.toml", "constraints.txt", "examples"} == set(mounts)
    assert all(remote == local and (ROOT / local).exists() for remote, local in mounts.items())
    assert any("-c constraints.txt '.[cluster]'" in command for command in cluster["setup_commands"])
    assert PINS["ray"] == ray.__version__
    pinned = {name.lower().replace("_", "-") for name in PINS}
    assert {"boto3", "prometheus-client", "aiohttp-cors", "opencensus"} <= pinned


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


@pytest.fixture
def launched(cluster, tmp_path, monkeypatch):
    """``ray up`` with the repository's file: machines on a mock EC2, commands recorded; then a worker of each type."""
    moto = pytest.importorskip("moto")
    import boto3
    from ray.autoscaler._private import commands, updater
    from ray.autoscaler._private.aws import config as aws
    from ray.autoscaler._private.aws import node_provider
    from ray.autoscaler._private.aws.utils import resource_cache

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "mock")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for module in (commands, updater):
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("sesame")
    resource_cache.cache_clear()
    with moto.mock_aws():
        iam = boto3.client("iam", region_name=cluster["provider"]["region"])
        for name in ("prism-head", "prism-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        # Of the mock's thousand instance types, those of the file: listing all takes seconds.
        asked = [t["node_config"]["InstanceType"] for t in cluster["available_node_types"].values()]
        ec2 = boto3.client("ec2", region_name=cluster["provider"]["region"])
        known = ec2.describe_instance_types(InstanceTypes=sorted(set(asked)))["InstanceTypes"]
        monkeypatch.setattr(node_provider, "list_ec2_instances", lambda region, credentials: known)
        config = aws.bootstrap_aws(
            node_provider.AWSNodeProvider.fillout_available_node_types_resources(validate(cluster))
        )
        provider = node_provider.AWSNodeProvider(config["provider"], config["cluster_name"])
        recorded = Recorded()
        commands.get_or_create_head_node(
            config, "ray_cluster.yaml", False, False, True, None, _provider=provider, _runner=recorded
        )
        for name, node_type in workers(config).items():
            provider.create_node(node_type["node_config"], {"ray-user-node-type": name}, 1)
        machines = {
            tag["Value"]: machine
            for reservation in ec2.describe_instances()["Reservations"]
            for machine in reservation["Instances"]
            for tag in machine["Tags"]
            if tag["Key"] == "ray-user-node-type"
        }
        yield recorded, machines, ec2
    resource_cache.cache_clear()


def test_ray_up_starts_these_machines(launched, cluster):
    recorded, machines, ec2 = launched
    assert set(machines) == set(cluster["available_node_types"])
    for name, machine in machines.items():
        asked = cluster["available_node_types"][name]
        role = "prism-head" if name == "head" else "prism-worker"
        assert machine["InstanceType"] == asked["node_config"]["InstanceType"]
        assert machine.get("InstanceLifecycle", "on-demand") == ("spot" if is_spot(asked) else "on-demand")
        assert machine["IamInstanceProfile"]["Arn"].endswith(role)
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        (disk,) = machine["BlockDeviceMappings"]
        volume = ec2.describe_volumes(VolumeIds=[disk["Ebs"]["VolumeId"]])["Volumes"][0]
        assert (volume["Size"], volume["VolumeType"]) == (150, "gp3")
        assert disk["Ebs"]["DeleteOnTermination"]

    # Only SSH is reachable from outside; the guide says how to narrow that.
    (group,) = {g["GroupId"] for machine in machines.values() for g in machine["SecurityGroups"]}
    rules = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]
    assert [(r["FromPort"], r["ToPort"]) for r in rules if r["IpRanges"]] == [(22, 22)]

    # In the order of the commands: token before the start, autoscaler v2 on, mode set, dashboard on the loopback.
    (token,) = [i for i, c in enumerate(recorded.commands) if c.startswith("rsync") and c.endswith("~/.ray/auth_token")]
    (start,) = [i for i, c in enumerate(recorded.commands) if "ray start --head" in c]
    assert token < start
    assert "RAY_enable_autoscaler_v2=1" in recorded.commands[start]
    assert "sesame" not in str(recorded.commands)
    assert "sesame" not in str(recorded.head_config)

    # What the head uses for the workers: the token and the package from its own disk.
    assert recorded.head_config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert recorded.head_config["file_mounts"]["~/prism/cluster"] == "~/prism/cluster"
    shapes = {n: t["resources"] for n, t in workers(recorded.head_config).items()}
    assert shapes["gpu1_on_demand"] == shapes["gpu1_spot"], "with the memory that the launcher looks up"


def test_ray_up_without_a_token_starts_nothing(cluster, tmp_path, monkeypatch):
    from ray.autoscaler._private.util import hash_runtime_conf

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="auth_token"):
        hash_runtime_conf(cluster["file_mounts"], None, {"no": "cache"})


@pytest.mark.parametrize(
    ("waiting", "started"),
    [
        (1, {"gpu1_spot": 1}),
        (2, {"gpu1_spot": 2}),
        (4, {"gpu4_spot": 1}),
        (5, {"gpu4_spot": 1, "gpu1_spot": 1}),
        (24, {"gpu4_spot": 4, "gpu1_spot": 8}),
        (100, {"gpu4_spot": 4, "gpu1_spot": 8, "gpu1_on_demand": 2}),
    ],
)
def test_what_the_autoscaler_starts_for_waiting_actors(cluster, waiting, started):
    """As the guide says: the large type while it is filled, then the small one, on demand when spot has its maximum."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    types = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=w["min_workers"],
            max_worker_nodes=w["max_workers"],
            resources=w["resources"],
            priority=w["priority"],
        )
        for name, w in workers(cluster).items()
    }
    requests = [ResourceRequestUtil.make({"GPU": 1}, []) for _ in range(waiting)]
    reply = ResourceDemandScheduler(event_logger=None).schedule(
        SchedulingRequest(
            node_type_configs=types,
            max_num_nodes=cluster["max_workers"],
            resource_requests=ResourceRequestUtil.group_by_count(requests),
            disable_launch_config_check=True,
        )
    )
    assert {launch.instance_type: launch.count for launch in reply.to_launch} == started


def test_commands_are_valid_shell(cluster):
    for key, commands in cluster.items():
        for command in commands if key.endswith("_commands") else []:
            subprocess.run(["bash", "-n", "-c", command], check=True)


def watch(tmp_path: Path, **stubs: str) -> list[str]:
    """Run what runs beside Ray on a worker machine, with stand-ins for programs; returns what was called."""
    stubs = {"sleep": "exit 0", "curl": "exit 22", "pgrep": "exit 1", "sudo": "exit 0", "python": "exit 0", **stubs}
    (tmp_path / "bin").mkdir()
    for name, body in stubs.items():
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/called\n{body}\n')
        path.chmod(0o755)
    script = ROOT / "cluster" / "worker_machine.sh"
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    subprocess.run(["bash", script, f"{tmp_path}/bin/python"], env=environment, check=True, timeout=60)
    return (tmp_path / "called").read_text().splitlines()


def test_notice_of_a_spot_machine_reaches_the_workers(tmp_path):
    """It comes at the third look."""
    curl = f"""case "$*" in
        *PUT*) echo token ;;
        *) test "$(grep -c instance-action {tmp_path}/called)" = 3 ;;
        esac"""
    called = watch(tmp_path, curl=curl, pgrep="exit 0")
    assert called[-1] == "python -m cluster.preemption --timeout 100"
    looks = [line for line in called if "instance-action" in line]
    assert len(looks) == 3
    assert all(
        "X-aws-ec2-metadata-token: token http://169.254.169.254/latest/meta-data/spot/" in look for look in looks
    )


def test_machine_without_raylet_ends_itself(tmp_path):
    """After 15 minutes in a row: the raylet is there at the tenth look for the last time."""
    called = watch(tmp_path, pgrep=f'test "$(grep -c pgrep {tmp_path}/called)" = 10')
    assert called[-1] == "sudo shutdown -h now"
    assert called.count("sleep 5") == 10 + 15 * 60 // 5
    assert not any(line.startswith("python") for line in called)


def test_worker_machines_are_watched_and_can_end_themselves(cluster):
    (command,) = [c for c in cluster["worker_start_ray_commands"] if "worker_machine.sh" in c]
    assert "~/prism/cluster/worker_machine.sh ~/venv/bin/python" in command
    assert "~/prism/cluster" in cluster["file_mounts"]
    for node_type in workers(cluster).values():
        assert node_type["node_config"]["InstanceInitiatedShutdownBehavior"] == "terminate"


def test_refused_spot_launches_do_not_bring_on_demand_machines():
    """What the guide says of Ray 2.60: EC2 refuses at once, and only launches that time out make a type less wanted."""
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    for status, less_wanted in ((Instance.ALLOCATION_FAILED, set()), (Instance.ALLOCATION_TIMEOUT, {"gpu1_spot"})):
        monitor.notify([InstanceUpdateEvent(new_instance_status=status, instance_type="gpu1_spot")])
        assert set(monitor.get_recoverable_resource_availabilities()) == less_wanted


def test_the_guide_grants_what_the_file_needs(cluster):
    """Policies of the guide are JSON, and name the roles, the tag and the image's parameter of the file."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    blocks = re.findall(r"^`(\w+)\.json`:\n\n```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    policies = {name: json.loads(block)["Statement"] for name, block in blocks}
    assert set(policies) == {"trust", "bucket", "head"}

    def allowed(action: str) -> list[dict[str, Any]]:
        return [
            s for s in policies["head"] if action in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])
        ]

    profiles = {n: t["node_config"]["IamInstanceProfile"]["Name"] for n, t in cluster["available_node_types"].items()}
    (passed,) = allowed("iam:PassRole")
    assert {f"role/{profiles[name]}" for name in workers(cluster)} == {passed["Resource"].split(":")[-1]}
    assert all(f"--role-name {name}" in text or name in text for name in profiles.values())
    (ended,) = allowed("ec2:TerminateInstances")
    assert ended["Condition"]["StringEquals"] == {"ec2:ResourceTag/ray-cluster-name": cluster["cluster_name"]}
    (looked_up,) = allowed("ssm:GetParameters")
    prefix = looked_up["Resource"].split("parameter")[1].rstrip("*")
    for node_type in cluster["available_node_types"].values():
        assert node_type["node_config"]["ImageId"].startswith(f"resolve:ssm:{prefix}")
    assert all("BUCKET" in s["Resource"] for s in policies["bucket"])
    # The quotas that the guide asks for.
    cpus = {True: 0, False: 0}
    for node_type in workers(cluster).values():
        cpus[is_spot(node_type)] += node_type["max_workers"] * node_type["resources"]["CPU"]
    assert f"= {cpus[True]} |" in text
    assert f"| {cpus[False]} |" in text
