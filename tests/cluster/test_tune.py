"""Ray Tune runs the jobs of a search: processes that die are run again, then given up; the others go on."""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
from ray.tune import Callback

from cluster import storage
from cluster.tune import EXPERIMENT, RESTARTS, Halving, run_here, run_tune

# Ray's workers cannot import a test module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Chain:
    """Three jobs at once, and a fourth when they are done."""

    most_jobs = 4

    def __init__(self) -> None:
        self.left: list[dict[str, Any]] = [{"key": f"job-{number}", "x": number} for number in range(3)]
        self.last: list[dict[str, Any]] = [{"key": "job-3", "x": 3}]
        self.found: dict[Hashable, Any] = {}

    @property
    def finished(self) -> bool:
        return len(self.found) == 4

    def hand_out(self) -> dict[str, Any] | None:
        if self.left:
            return self.left.pop(0)
        return self.last.pop() if self.last and len(self.found) == 3 else None

    def take(self, key: Hashable, result: dict[str, Any] | None) -> None:
        assert key not in self.found
        self.found[key] = result and result["value"]


class Listed(Chain):
    """The same, keeping whole results."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[Hashable, Any] = {}

    def take(self, key: Hashable, result: dict[str, Any] | None) -> None:
        self.results[key] = result
        super().take(key, {"value": None})


class Listener(Callback):
    """What an experiment tracker hears."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.values[trial.config["key"]] = str(result["value"])


def make_work(folder: str) -> Any:
    def work(job: dict[str, Any]) -> dict[str, Any]:
        (Path(folder) / f"{job['key']}-{time.monotonic_ns()}").touch()
        if job["x"] == 1 and folder.endswith("ray"):
            if len(list(Path(folder).glob("job-1-*"))) == 1:
                raise ValueError("http://user:a-password@host does not answer")
            os._exit(1)  # as the kernel does to a process that takes too much memory
        return {"value": float("nan") if job["x"] == 2 else 10.0 * job["x"], "reason": "some words"}

    return work


@pytest.mark.ray
def test_jobs_run_under_tune(ray_local: None, tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    jobs = Chain()
    told = Listener()
    run_tune(make_work(str(folder)), jobs, str(tmp_path), 0.5, 0.0, 2, [told])
    # As text, for one is not a number.
    assert told.values == {key: str(value) for key, value in jobs.found.items() if value is not None}
    assert jobs.found["job-0"] == 0.0
    assert jobs.found["job-1"] is None
    assert jobs.found["job-2"] != jobs.found["job-2"]
    assert jobs.found["job-3"] == 30.0
    # A process that ends may have been unlucky; a failure in words is not repeated.
    starts = [path.name[:5] for path in folder.iterdir()]
    assert [starts.count(f"job-{number}") for number in range(4)] == [1, 1 + RESTARTS, 1, 1]
    # What users are sent to, without secrets.
    words = (tmp_path / EXPERIMENT / "job-1" / "error.txt").read_text()
    assert "ValueError: http://***@host does not answer" in words
    assert b"a-password" not in b"".join(p.read_bytes() for p in (tmp_path / EXPERIMENT).rglob("*") if p.is_file())
    # What people open with TensorBoard.
    assert list((tmp_path / EXPERIMENT).rglob("events.out.tfevents*"))


class Two(Chain):
    """Two jobs, named by the start."""

    most_jobs = 2

    def __init__(self, start: str) -> None:
        super().__init__()
        self.left = [{"key": f"{start}-{number}", "x": number} for number in range(2)]

    @property
    def finished(self) -> bool:
        return len(self.found) == 2


@pytest.mark.ray
@pytest.mark.s3
def test_records_on_s3_are_those_of_the_last_start(ray_local: None, s3_server: str) -> None:
    folder = f"{s3_server}/{uuid.uuid4().hex}"
    for start in ("first", "second"):
        jobs = Two(start)
        run_tune(lambda job: {"value": 10.0 * job["x"]}, jobs, folder, 0.5, 0.0, 2)
        assert jobs.found == {f"{start}-0": 0.0, f"{start}-1": 10.0}
        fs, path = storage.resolve(storage.join(folder, EXPERIMENT))
        assert {name.removeprefix(f"{path}/").rpartition("/")[0] for name in fs.find(path)} == {"", *jobs.found}
        for key in jobs.found:
            assert {"params.json", "result.json"} <= storage.list_files(storage.join(folder, EXPERIMENT, key)).keys()


def test_jobs_run_here(tmp_path: Path) -> None:
    jobs = Chain()
    run_here(make_work(str(tmp_path)), jobs)
    assert list(jobs.found) == [f"job-{number}" for number in range(4)]


def test_what_raises_here_is_run_again_then_given_up() -> None:
    starts: list[str] = []

    def work(job: dict[str, Any]) -> dict[str, Any]:
        starts.append(job["key"])
        if job["x"] == 1 or (job["x"] == 2 and starts.count("job-2") == 1):
            raise OSError(28, "No space left on device")
        return {"value": job["x"]}

    jobs = Listed()
    run_here(work, jobs)
    assert jobs.results["job-1"] == {"reason": "OSError: [Errno 28] No space left on device"}
    assert [jobs.results[f"job-{number}"]["value"] for number in (0, 2, 3)] == [0, 2, 3]
    assert [starts.count(f"job-{number}") for number in range(4)] == [1, 1 + RESTARTS, 2, 1]


def test_halving_keeps_the_best_third() -> None:
    """At every rung, of those that were seen there before; the first always goes on."""
    halving = Halving(3, 3.0)
    assert halving.goes_on(0, 0, 50.0)
    assert not halving.goes_on(1, 0, 49.0)
    assert halving.goes_on(2, 0, 60.0)
    # The percentile of 49, 50, 60 at two thirds is 53.3.
    assert not halving.goes_on(3, 0, 53.0)
    assert halving.goes_on(4, 0, 57.0)
    assert halving.goes_on(2, 1, 10.0)
    assert not halving.goes_on(0, 1, 9.0)
