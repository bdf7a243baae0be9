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
from mock_ec2 import ROOT, ray_up

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
        (("available_node_types", "gpu1"), "prority", 1, "prority"),
        (("available_node_types", "gpu1", "resources"), "GPU", 0.5, "0.5 is not of type 'integer'"),
        (("available_node_types", "gpu4"), "max_workers", "four", "'four' is not of type 'integer'"),
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
    assert all(is_spot(w) and w["min_workers"] == 0 for w in workers(cluster).values())
    assert {w["resources"]["GPU"] for w in workers(cluster).values()} == {1, 4}
    assert cluster["max_workers"] == sum(w["max_workers"] for w in workers(cluster).values())
    assert not any("MaxPrice" in str(w) for w in workers(cluster).values())
    assert all(0 < w["node_config"]["OnDemandFallback"] < w["max_workers"] for w in workers(cluster).values())


def test_the_provider_of_this_package_loses_none_of_rays_defaults(cluster):
    """Those of Docker apart, which is not used, and with which Ray warns of every file that is mounted."""
    provider = {k: v for k, v in cluster["provider"].items() if k != "module"}
    own = validate({**cluster, "provider": {**provider, "type": "aws"}})
    assert own.pop("docker") == {}
    assert validate(cluster) == {**own, "provider": cluster["provider"]}


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


@pytest.fixture
def head(tmp_path, monkeypatch):
    with ray_up(tmp_path, monkeypatch) as head:
        yield head


def test_ray_up_starts_these_machines(head, cluster):
    """And the head's autoscaler one of each type, from the file that it was sent."""
    assert head.launch(**dict.fromkeys(workers(cluster), 1)) == []
    recorded, ec2 = head.recorded, head.ec2
    machines = {machine["Tags"]["ray-user-node-type"]: machine for machine in head.machines()}
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
    assert all(w["resources"]["memory"] > 2**30 for w in workers(recorded.head_config).values()), "looked up"


def test_ray_up_without_a_token_starts_nothing(cluster, tmp_path, monkeypatch):
    from ray.autoscaler._private.util import hash_runtime_conf

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="auth_token"):
        hash_runtime_conf(cluster["file_mounts"], None, {"no": "cache"})


@pytest.mark.parametrize(
    ("waiting", "started"),
    [
        (1, {"gpu1": 1}),
        (2, {"gpu1": 2}),
        (4, {"gpu4": 1}),
        (5, {"gpu4": 1, "gpu1": 1}),
        (24, {"gpu4": 4, "gpu1": 8}),
        (100, {"gpu4": 4, "gpu1": 8}),
    ],
)
def test_what_the_autoscaler_starts_for_waiting_actors(cluster, waiting, started):
    """As the guide says: the large type while it is filled, then the small one."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    types = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=w["min_workers"],
            max_worker_nodes=w["max_workers"],
            resources=w["resources"],
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
    spot, on_demand = 0, 0
    for node_type in workers(cluster).values():
        spot += node_type["max_workers"] * node_type["resources"]["CPU"]
        on_demand += node_type["node_config"]["OnDemandFallback"] * node_type["resources"]["CPU"]
    for quota, cpus in (("All G and VT Spot", spot), ("Running On-Demand G and VT", on_demand)):
        assert re.search(rf"^\| {quota} .* = {cpus} \|$", text, re.MULTILINE), quota
