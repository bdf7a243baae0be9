"""The KubeRay manifests and the image they use: valid by schema, one shape in both, safe settings kept."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "kuberay"
SCHEMA = yaml.safe_load((ROOT / "tests" / "data" / "kuberay.schema.yaml").read_text())
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def validate(thing: dict[str, Any]) -> None:
    """Against the schema of its kind, whose errors name the field."""
    jsonschema.validate(thing, {**SCHEMA, "oneOf": [{"$ref": f"#/$defs/{thing['kind']}"}]})


@pytest.fixture
def job() -> dict[str, Any]:
    (only,) = objects("rayjob.yaml")
    return only


@pytest.fixture
def cluster() -> dict[str, Any]:
    (only,) = objects("raycluster.yaml")
    return only


def groups(cluster: dict[str, Any]) -> dict[str, Any]:
    return {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    specs = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    return [spec["template"]["spec"] for spec in specs]


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_valid_by_the_schema(name):
    for thing in objects(name):
        validate(thing)


MUTATIONS: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("spec", "entryPoint"), "prism run", "entryPoint"),
    (("spec", "backoffLimit"), "3", "'3' is not of type 'integer'"),
    (("spec", "activeDeadlineSeconds"), 0, "0 is less than the minimum"),
    (("spec", "shutdownAfterJobFinishes"), False, "True was expected"),
    (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens", "tokens"),
    (("spec", "rayClusterSpec", "autoscalerOptions", "version"), 2, "2 is not one of"),
    (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "0 is not of type 'string'"),
    (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplica"), 0, "minReplica"),
    (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "groupName"), "gpu1_spot", "gpu1_spot"),
    (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "restartPolicy"), "never", "never"),
    (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "nodeselector"), {}, "nodeselector"),
    (
        ("spec", "rayClusterSpec", "workerGroupSpecs", 1, "template", "spec", "containers", 0, "resources", "limits"),
        {"memory": "170 GiB"},
        "170 GiB",
    ),
]


@pytest.mark.parametrize(("place", "value", "said"), MUTATIONS, ids=[str(place[-1]) for place, *_ in MUTATIONS])
def test_the_schema_refuses_mistakes(job, place, value, said):
    section: Any = job
    for name in place[:-1]:
        section = section[name]
    section[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=re.escape(said)):
        validate(job)


@pytest.mark.parametrize("missing", ["headGroupSpec", "workerGroupSpecs.maxReplicas"])
def test_the_schema_asks_for_what_is_required(cluster, missing):
    if missing == "headGroupSpec":
        del cluster["spec"]["headGroupSpec"]
    else:
        del cluster["spec"]["workerGroupSpecs"][0]["maxReplicas"]
    with pytest.raises(jsonschema.ValidationError, match="is a required property"):
        validate(cluster)


def test_both_manifests_have_one_shape(job, cluster):
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_ray_makes_of_it_the_same_cluster_as_the_launcher(cluster):
    """Through Ray's own reader of RayCluster objects, and its own schema."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    config = _derive_autoscaling_config_from_ray_cr(copy.deepcopy(cluster))
    validate_config(config)
    read = {k: v for k, v in config["available_node_types"].items() if k != config["head_node_type"]}
    launcher = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    for name, node_type in read.items():
        twin = launcher["available_node_types"][name.partition("-")[0]]
        # The launcher's provider buys on demand within a type, and not four GPUs alone.
        fallback = name.endswith("-on-demand")
        most = twin["node_config"]["OnDemandFallback"] if fallback else twin["max_workers"]
        assert (node_type["min_workers"], node_type["max_workers"]) == (twin["min_workers"], most), name
        assert node_type["priority"] == (0 if fallback else 10)
        assert node_type["resources"]["GPU"] == twin["resources"]["GPU"]
    assert set(read) == {"gpu1-spot", "gpu4-spot", "gpu1-on-demand"}
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0
    assert read["gpu1-on-demand"]["resources"] == read["gpu1-spot"]["resources"], "only then does priority decide"
    assert config["max_workers"] == sum(node_type["max_workers"] for node_type in read.values())
    assert config["idle_timeout_minutes"] == launcher["idle_timeout_minutes"]


def test_spot_goes_to_spot_nodes_and_the_head_does_not(cluster):
    market = "karpenter.sh/capacity-type"
    assert cluster["spec"]["headGroupSpec"]["template"]["spec"]["nodeSelector"][market] == "on-demand"
    for name, group in groups(cluster).items():
        spot = group["labels"]["market"] == "spot"
        pod = group["template"]["spec"]
        assert name.endswith("-spot") == spot
        assert pod["nodeSelector"][market] == group["labels"]["market"]
        assert {t["key"] for t in pod["tolerations"]} == {"nvidia.com/gpu", "spot"} if spot else {"nvidia.com/gpu"}


def test_workers_are_told_before_they_go(cluster):
    for group in groups(cluster).values():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "-m", "cluster.preemption"]
        timeout = float(command[command.index("--timeout") + 1])
        assert timeout < pod["terminationGracePeriodSeconds"] < 120, "within the notice of a spot machine"


def test_token_identity_and_rights(job, cluster):
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    accounts = [thing for thing in objects("base.yaml") if thing["kind"] == "ServiceAccount"]
    assert {pod["serviceAccountName"] for pod in pods(cluster)} == {account["metadata"]["name"] for account in accounts}
    for pod in pods(cluster):
        assert pod["restartPolicy"] == "Never"
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
    for text in (FOLDER / "base.yaml", FOLDER / "rayjob.yaml", FOLDER / "raycluster.yaml", ROOT / "Dockerfile"):
        assert not re.search(r"AWS_|AKIA|0\.0\.0\.0|kind: Secret", text.read_text())
    assert {thing["metadata"].get("namespace") for thing in (job, cluster)} == {"prism"}


def test_a_run_ends_with_its_cluster_and_a_retry_continues_it(job):
    assert job["spec"]["entrypoint"].startswith("prism run /etc/prism/prism.yaml")
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert job["spec"]["backoffLimit"] > 0


def test_image_ray_and_package_are_of_the_pinned_versions(cluster):
    from cluster.version import __version__

    assert cluster["spec"]["rayVersion"] == PINS["ray"]
    images = {container["image"] for pod in pods(cluster) for container in pod["containers"]}
    assert images == {f"REGISTRY/prism:{__version__}"}


def test_the_image_has_what_it_copies_and_nothing_else():
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE) for word in line.split()]
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignored
    assert sorted(line[1:] for line in ignored if line.startswith("!")) == sorted(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert "-c constraints.txt '.[cluster]'" in dockerfile
    assert re.search(r"^USER 1000$", dockerfile, re.MULTILINE)
    assert "wget" in dockerfile, "KubeRay's probes call it"
