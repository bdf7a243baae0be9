"""The cluster file is valid by Ray's own schema, and keeps the safe settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_valid_by_rays_schema(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster))


def test_ray_refuses_what_is_not_in_the_schema(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(Exception, match="max_wrkers"):
        validate_config(prepare_config({**cluster, "max_wrkers": 3}))


def test_head_runs_no_work_and_is_not_open(cluster):
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"]["CPU"] == 0
    starts = " ".join(cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"])
    assert "0.0.0.0" not in starts
    assert starts.count("RAY_AUTH_MODE=token") == 2


def test_workers_are_spot_and_start_at_zero(cluster):
    workers = {k: v for k, v in cluster["available_node_types"].items() if k != cluster["head_node_type"]}
    assert all(w["min_workers"] == 0 for w in workers.values())
    assert any(w["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot" for w in workers.values())
