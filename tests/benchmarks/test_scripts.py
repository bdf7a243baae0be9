"""Benchmarks still run; what they measure is not looked at. Others run in the tests of what they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster import shards

ROOT = Path(__file__).resolve().parents[2]


def result_of(*words: str | Path) -> str:
    """What a script prints."""
    command = [sys.executable, ROOT / "benchmarks" / words[0], *words[1:]]
    found = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


def test_device_speed() -> None:
    found = json.loads(result_of("device_speed.py", "smoke", "1"))
    assert found["share_of_bare"].keys() == {"relabel", "student"}
    assert min(found["images_per_s"].values()) > 0


def test_make_demo_data(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(60, dtype=np.uint8) % 10)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (tmp_path / f"{prefix}-{kind}-ubyte").write_bytes(head + array.tobytes())
    assert "bytes in" in result_of("make_demo_data.py", tmp_path, tmp_path / "out", "40", "20")
    for split, rows in (("train", 40), ("val", 20)):
        dataset = shards.load_dataset(str(tmp_path / "out" / split))
        assert [count for _, count in dataset.shards] == [rows]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    "words",
    [
        ["driver_memory.py", "3"],
        ["placement.py"],
        ["ray_cost.py", "2", "2", "1"],
        ["start_up.py", "smoke", "1"],
        ["scale.py", "driver", "120"],
    ],
    ids=lambda words: words[0],
)
def test_prints_one_result(words: list[str]) -> None:
    assert json.loads(result_of(*words))


@pytest.mark.slow
def test_planning_at_scale() -> None:
    assert json.loads(result_of("scale.py", "plan"))
