"""Memory does not grow with the labels, of which there are more than Ray's object store holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_four_times_the_labels_take_no_more_memory():
    """The benchmark in a smaller form: 80 MB of labels, then 320 MB, with an object store of 128 MB."""
    command = [sys.executable, "benchmarks/label_memory.py", "2", "8"]
    small, large = json.loads(subprocess.check_output(command, cwd=ROOT))["runs"]
    assert large["labels_mb"] > 3.9 * small["labels_mb"]
    assert large["labels_over_object_store"] > 2
    own = {(row["phase"], row["process"]): row["peak_own_mb"] for row in small["processes"]}
    seen = set()
    for row in large["processes"]:
        name, before = row["process"], own.get((row["phase"], row["process"]))
        # Others are Ray's own, or idle between two tasks.
        if before is None or not name.startswith(("actor ", "driver", "raylet", "ray::RayTrainWorker")):
            continue
        seen.add(name)
        # An allocator keeps what it once had, two units of logits are 54 MB; all labels would be 240 MB more.
        assert row["peak_own_mb"] < before + 100, (row, before)
    actors = {f"actor {each}" for each in ("RelabelFast", "RelabelSlow", "RelabelCommit", "Validate")}
    assert seen >= actors | {"driver", "raylet", "ray::RayTrainWorker"}
