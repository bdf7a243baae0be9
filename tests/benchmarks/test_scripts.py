"""Benchmarks still run; what they measure is not looked at. Others run in the tests of what they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    "words",
    [["driver_memory.py", "3"], ["placement.py"], ["ray_cost.py", "2", "2", "1"], ["scale.py", "driver", "120"]],
    ids=lambda words: words[0],
)
def test_prints_one_result(words: list[str]) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / words[0]), *words[1:]]
    found = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert json.loads(found.stdout)


@pytest.mark.slow
def test_planning_at_scale() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "plan"]
    found = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert json.loads(found.stdout)
