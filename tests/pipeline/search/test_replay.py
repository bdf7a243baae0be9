"""A search by TPE and halving against a recorded table of full evaluations: nothing is trained."""

from __future__ import annotations

import importlib.util
import itertools
import math
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cluster import storage

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("search_replay", BENCHMARKS / "search_replay.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    # Where its dataclasses look for their types.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def replay(script: ModuleType) -> Any:
    return script.Replay(storage.read_json(str(BENCHMARKS / "results" / "search_replay.json")))


def test_the_table_is_of_the_whole_grid_and_of_todays_settings(script: ModuleType, replay: Any) -> None:
    rungs = range(len(replay.search.options.rungs))
    assert replay.rows.keys() == {replay._key(point, rung) for point, rung in itertools.product(script.grid(), rungs)}
    assert len(replay.rows) == len(replay.table["rows"])
    assert replay.table["measured_by"] == script.measured_by(replay.search)


def test_tpe_and_halving_find_what_random_search_finds_in_half_of_its_seconds(script: ModuleType, replay: Any) -> None:
    shares = [replay.share(seed) for seed in range(script.SEARCHES)]
    assert statistics.median(shares) <= 0.5
    assert sum(share == math.inf for share in shares) <= script.SEARCHES // 5
    assert replay.share(0) == shares[0]


def test_what_counts_is_a_full_measurement_and_all_seconds_before_it(script: ModuleType, replay: Any) -> None:
    trials, last = replay.search.options.trials, len(replay.search.options.rungs) - 1
    full = replay.play("random", halving=False, seed=0)
    # Every trial in full; a point that comes again costs nothing.
    assert len(full) == trials + 1
    known = {(row["seconds"], row["top1"]) for row in replay.table["rows"] if row["rung"] == last}
    steps = [(round(b - a, 2), top1) for (a, _), (b, top1) in itertools.pairwise([(0.0, 0.0), *full[:-1]])]
    assert all((seconds, top1) in known for seconds, top1 in steps if seconds)
    # Halving measures fewer in full, and before the first of them at least its own earlier rungs are paid.
    halved = replay.play("tpe", halving=True, seed=0)
    assert 1 < len(halved) < trials / 2
    assert halved[0][0] > min(seconds for seconds, _ in known)
