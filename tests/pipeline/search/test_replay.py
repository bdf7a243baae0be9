"""A search by TPE and halving against a recorded table of full evaluations: nothing is trained."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cluster import storage
from pipeline.loading import merge

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
    # Fields that came later had no say.
    today = script.measured_by(replay.search)
    assert merge(today, replay.table["measured_by"]) == today


def test_tpe_and_halving_find_what_random_search_finds_in_half_of_its_seconds(replay: Any) -> None:
    """Random search itself takes most of the seconds of another random search to come to the same."""
    ours = replay.shares()
    assert statistics.median(ours) <= 0.5
    assert statistics.fmean(share <= 0.5 for share in ours) >= 0.6
    assert statistics.median(ours) <= 0.8 * statistics.median(replay.shares(halving=False))
    assert statistics.median(ours) <= 0.7 * statistics.median(replay.shares("random", halving=False))
    assert replay.play("tpe", True, 0) == replay.play("tpe", True, 0)


def test_what_counts_is_a_full_measurement_and_all_seconds_before_it(script: ModuleType, replay: Any) -> None:
    trials, last = replay.search.options.trials, len(replay.search.options.rungs) - 1
    full = replay.play("random", halving=False, seed=0)
    # Every trial in full; a point that comes again costs nothing.
    assert len(full) == trials + 1
    known = {row["top1"] for row in replay.table["rows"] if row["rung"] == last}
    assert {top1 for _, top1 in full[:-1]} <= known
    steps = {round(b - a, 6) for (a, _), (b, _) in itertools.pairwise([(0.0, 0.0), *full[:-1]])}
    assert steps <= {0.0, round(replay.seconds[last], 6)}
    # Halving measures fewer in full, and before the first of them its own earlier rungs are paid.
    halved = replay.play("tpe", halving=True, seed=0)
    assert 1 < len(halved) < trials / 2
    assert halved[0][0] >= sum(replay.seconds)
