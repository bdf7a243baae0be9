"""Ray Tune runs the jobs: those that fail, whichever way, are results like others."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.cloudpickle

from cluster.errors import RunError
from pipeline.search import tuning
from pipeline.search.ladder import LOST, Ladder
from pipeline.search.trial import Measured, Trial

# Ray's workers cannot import a test module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

TRIALS = 6


class FakeBench:
    """A job's configuration is its point."""

    options = SimpleNamespace(cpus=0.5)

    def config(self, point: dict[str, Any], rung: int) -> dict[str, Any]:
        return {**point, "rung": rung}


def measure(root: str, config: dict[str, Any], job: str) -> Measured:
    """Fails for some points, each in its own way."""
    (Path(root) / "ran" / f"{job}-{os.getpid()}-{time.monotonic_ns()}").touch()
    match config["x"]:
        case 1:
            raise RunError("unit-00000-00000 (seed 7) diverged")
        case 2:
            os._exit(1)  # as the kernel does to a process that takes too much memory
        case 3:
            return SimpleNamespace(model_dump=lambda mode: {"top1": math.nan, "top1_seeds": [], "seconds": 1.0})
    top1 = 10.0 * config["x"] + config["rung"]
    return Measured(top1=top1, top1_seeds=[top1], gpu_seconds=0.0, seconds=1.0)


def make_ladder() -> Ladder:
    return Ladder(
        lambda number: {"x": number},
        lambda number, found: None,
        dict,
        lambda point, rung: (1.0, 1.0),
        trials=TRIALS,
        rungs=2,
        parallel=2,
    )


@pytest.mark.ray
def test_trials_that_fail_say_why_and_the_others_are_measured(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "measure", measure)
    (tmp_path / "ran").mkdir()
    trials: list[Trial] = tuning.run_tune(str(tmp_path), FakeBench(), make_ladder(), 0.0)  # type: ignore[arg-type]
    found = {trial.number: (trial.state, trial.reason) for trial in trials}
    assert found[1] == ("failed", "unit-00000-00000 (seed 7) diverged")
    assert found[2] == ("failed", LOST)
    assert found[3] == ("failed", "its accuracy is nan")
    assert {found[number][0] for number in (0, 4, 5)} <= {"finished", "stopped"}
    assert found[5][0] == "finished"
    assert [rung.top1 for rung in trials[5].rungs] == [50.0, 51.0]
    # A process that ends may have been unlucky; a failure in words is not repeated.
    starts = [path.name[:7] for path in (tmp_path / "ran").iterdir()]
    assert starts.count("00002-0") == 1 + tuning.RESTARTS
    assert starts.count("00001-0") == 1
    # What people open with TensorBoard.
    assert list((tmp_path / tuning.EXPERIMENT).rglob("events.out.tfevents*"))
