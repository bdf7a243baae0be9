"""Both runners over the same stages: same rows, failures that stay rows, pools that fit on two CPUs."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
import ray.data
import torch

from cluster import runner
from cluster.attempts import Attempts
from cluster.capacity import Capacity, Growth, Node, combine
from cluster.errors import RunError, UserError
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Guarded, Row, failures, fit_pools, run_ray, run_serial, say_waiting

# Ray's workers cannot import a test module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Add:
    """Adds a number; remembers how often it was built."""

    def __init__(self, amount: int, log: str = ""):
        self.amount = amount
        if log:
            (Path(log) / f"{amount}-{os.getpid()}-{time.monotonic_ns()}").touch()

    def __call__(self, row: Row) -> Row:
        return {**row, "value": row["value"] + self.amount, "threads": torch.get_num_threads()}


class Fail:
    """Fails for some ids, each in its own way."""

    def __call__(self, row: Row) -> Row:
        if row["id"] == "r1":
            raise UserError("field x: wrong; write y")
        if row["id"] == "r2":
            raise RunError("unit r2 (seed 7) broke")
        if row["id"] == "r3":
            raise ZeroDivisionError("by zero")
        return {**row, "extra": np.arange(3.0)}


def make_sum() -> Any:
    """A factory that is a function, not a class."""
    return lambda row: {"id": row["id"], "error": "", "sum": float(row["extra"].sum() + row["value"])}


def rows(count: int = 6) -> list[Row]:
    return [{"id": f"r{i}", "error": "", "value": i} for i in range(count)]


def stages(log: str = "", **resources: Any) -> list[ActorStage]:
    wanted = ActorResources(**resources)
    return [
        ActorStage("add", Add, {"amount": 10, "log": log}, wanted),
        ActorStage("fail", Fail, {}, wanted),
        ActorStage("sum", make_sum, {}, wanted),
    ]


EXPECTED = {
    "r0": ("", 13.0),
    "r1": ("fail: field x: wrong; write y", None),
    "r2": ("fail: unit r2 (seed 7) broke", None),
    "r3": ("fail: ZeroDivisionError: by zero", None),
    "r4": ("", 17.0),
    "r5": ("", 18.0),
}


def outcome(found: list[Row]) -> dict[str, tuple[str, float | None]]:
    assert len(found) == len({row["id"] for row in found})
    return {row["id"]: (row["error"], row.get("sum")) for row in sorted(found, key=lambda row: row["id"])}


def test_serial_runs_all_rows_and_keeps_failures(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.ERROR, "prism"):
        found = list(run_serial(rows(), stages(str(tmp_path))))
    assert outcome(found) == EXPECTED
    assert [row["id"] for row in failures(found)] == ["r1", "r2", "r3"]
    # Only the unexpected one is worth a traceback.
    assert len(caplog.records) == 1
    assert "ZeroDivisionError" in caplog.text
    assert "test_runner.py" in caplog.text
    assert len(list(tmp_path.iterdir())) == 1  # built once for all rows


def test_serial_is_lazy_and_empty_is_fine(tmp_path: Path) -> None:
    iterator = run_serial(rows(), stages(str(tmp_path)))
    assert not list(tmp_path.iterdir())
    next(iterator)
    iterator.close()
    assert list(run_serial([], stages())) == []


def test_threads_are_the_stages_and_then_restored() -> None:
    before = torch.get_num_threads()
    iterator = run_serial(rows(2), [ActorStage("add", Add, {"amount": 1}, ActorResources(threads=2))])
    torch.set_num_threads(1)
    try:
        assert next(iterator)["threads"] == 2
        iterator.close()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_guarded_passes_failed_rows_through_untouched() -> None:
    stage = Guarded(ActorStage("add", Add, {"amount": 1}))
    failed = {"id": "r9", "error": "before: broke"}
    assert stage(failed) is failed


def one_node(cpus: float, gpus: float) -> Capacity:
    return combine([Node(cpus, gpus)], [], Growth((), 0))


def cannot_start() -> Any:
    raise UserError("teachers.a.weights: missing; give a file")


def test_a_stage_that_cannot_start_says_so_in_every_row() -> None:
    found = list(run_serial(rows(2), [ActorStage("add", Add, {"amount": 1}), ActorStage("load", cannot_start)]))
    assert [row["error"] for row in found] == ["load: teachers.a.weights: missing; give a file"] * 2
    (row,) = run_serial(rows(1), [ActorStage("add", Add, {"nonsense": 1})])
    assert row["error"].startswith("add: TypeError: ")


@pytest.mark.parametrize(
    ("totals", "resources", "num_stages", "num_rows", "expected"),
    [
        # Two CPUs: as many actors as CPUs, all pools together below the CPUs there are.
        ((2, 0), {}, 1, 100, (1, 2, 0.9, 0.0)),
        ((2, 0), {}, 3, 100, (1, 1, 0.6, 0.0)),
        ((16, 0), {}, 3, 100, (1, 5, 0.96, 0.0)),
        ((2, 0), {"actors": 1}, 3, 100, (1, 1, 0.6, 0.0)),
        ((2, 0), {"actors": 5}, 3, 100, (5, 5, 0.12, 0.0)),
        # No more actors than rows; threads cost CPUs.
        ((64, 0), {}, 1, 3, (1, 3, 1.0, 0.0)),
        ((64, 0), {"threads": 8}, 1, 100, (1, 8, 7.2, 0.0)),
        ((1, 0), {}, 2, 10, (1, 1, 0.45, 0.0)),
        # GPU actors take no CPU; fractions share a device.
        ((16, 4), {}, 1, 100, (1, 4, 0.0, 1.0)),
        ((16, 4), {"gpus": 0.5}, 1, 100, (1, 8, 0.0, 0.5)),
        ((16, 4), {"gpus": 0, "actors": (2, 6)}, 1, 100, (2, 6, 1.0, 0.0)),
        # What is asked for explicitly is taken.
        ((2, 0), {"cpus": 0.25, "actors": 2}, 1, 100, (2, 2, 0.25, 0.0)),
    ],
)
def test_fit_pools(
    monkeypatch: pytest.MonkeyPatch,
    totals: tuple[float, float],
    resources: dict[str, Any],
    num_stages: int,
    num_rows: int,
    expected: tuple[int, int, float, float],
) -> None:
    monkeypatch.setattr("cluster.runner.read_capacity", lambda: one_node(*totals))
    pools = fit_pools([ActorStage("s", Add, {}, ActorResources(**resources))] * num_stages, num_rows)
    assert pools == [pytest.approx(expected)] * num_stages


def test_automatic_shares_leave_room_for_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus in (1, 2, 3, 8, 96):
        monkeypatch.setattr("cluster.runner.read_capacity", lambda cpus=cpus: one_node(cpus, 0))
        for count in (1, 2, 3, 7):
            for threads in (1, 2, 4):
                stage = ActorStage("s", Add, {}, ActorResources(threads=threads))
                asked = sum(high * share for _, high, share, _ in fit_pools([stage] * count, 10_000))
                assert asked <= 0.91 * cpus


@pytest.mark.ray
def test_ray_equals_serial(ray_local: None, tmp_path: Path) -> None:
    """Three automatic pools on two CPUs: finishes at all, with the serial runner's rows."""
    found = list(run_ray(rows(), stages(str(tmp_path))))
    assert outcome(found) == EXPECTED
    pids = [file.name.split("-")[1] for file in tmp_path.iterdir()]
    assert len(pids) == len(set(pids)) <= 2  # one build an actor
    assert list(run_ray([], stages())) == []


@pytest.mark.ray
def test_ray_stage_that_cannot_start_says_so_in_every_row(ray_local: None) -> None:
    """Raising in an actor's constructor would make Ray restart it without end."""
    found = list(run_ray(rows(2), [ActorStage("load", cannot_start)]))
    assert [row["error"] for row in found] == ["load: teachers.a.weights: missing; give a file"] * 2


class Die:
    """Ends its process at one row, as running out of memory does."""

    def __call__(self, row: Row) -> Row:
        if row["id"] == "r1":
            os._exit(1)
        return row


@pytest.mark.ray
def test_a_row_that_ends_its_worker_is_given_up(ray_local: None, tmp_path: Path) -> None:
    stage = ActorStage("die", Die, {}, ActorResources(actors=1), Attempts(str(tmp_path), "s", "lower x", 7))
    found = {row["id"]: row["error"] for row in run_ray(rows(3), [stage])}
    assert found.pop("r1").startswith("die: r1 (seed 7) lost its worker 3 times")
    assert found == {"r0": "", "r2": ""}


@pytest.mark.ray
@pytest.mark.slow
def test_many_rows_through_three_fixed_pools(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six actors on two CPUs, each with the threads it was given; in three pipelines, one after the other."""
    monkeypatch.setattr(runner, "WINDOW", 8)
    wanted = ActorResources(actors=2, threads=2, cpus=0.25)
    chain = [ActorStage(f"add-{n}", Add, {"amount": n, "log": str(tmp_path)}, wanted) for n in (1, 10, 100)]
    found = list(run_ray(rows(24), chain))
    # One pipeline has two actors a stage at most.
    assert all(len(list(tmp_path.glob(f"{n}-*"))) >= 3 for n in (1, 10, 100))
    assert {row["id"]: row["value"] for row in found} == {f"r{i}": i + 111 for i in range(24)}
    assert {row["threads"] for row in found} == {2}


class WorksThird:
    """Cannot start in the first process, breaks in the second: two machines whose devices are ill."""

    def __init__(self, log: str):
        (Path(log) / str(os.getpid())).touch()
        self.started = len(list(Path(log).iterdir()))
        if self.started == 1:
            raise RuntimeError("no device")

    def __call__(self, row: Row) -> Row:
        if self.started == 2:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return row


@pytest.mark.ray
def test_a_worker_with_a_broken_device_does_not_fail_the_rows(ray_local: None, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    starts = Attempts(str(tmp_path / "starts"), "s", "")
    stage = ActorStage("start", WorksThird, {"log": str(tmp_path / "log")}, ActorResources(actors=1), starts=starts)
    assert {row["id"]: row["error"] for row in run_ray(rows(2), [stage])} == {"r0": "", "r1": ""}
    assert len(list((tmp_path / "log").iterdir())) == 3


def test_a_row_carries_its_starts_through_all_stages(tmp_path: Path) -> None:
    """Of all stages together, and only those of the same content."""

    def attempts(stage: str, key: str = "") -> Attempts:
        return Attempts(str(tmp_path / stage), "s", "", key=key)

    attempts("a").begin("r0", 1)
    attempts("b").begin("r0", 1)
    attempts("b").begin("r0", 1)
    attempts("b").begin("r1", 1)
    chain = [ActorStage(name, Add, {"amount": 1}, attempts=attempts(name)) for name in "ab"]
    assert {row["id"]: row["attempt"] for row in run_serial(rows(2), [*chain, ActorStage("c", Forget)])} == {
        "r0": 4,
        "r1": 2,
    }
    other = ActorStage("b", Forget, attempts=attempts("b", "other"))
    assert [row["attempt"] for row in run_serial(rows(1), [other])] == [1]
    attempts("b").clear()
    assert not list((tmp_path / "b").iterdir())


class Forget:
    """Returns a row of its own, as a commit does."""

    def __call__(self, row: Row) -> Row:
        return {"id": row["id"], "error": ""}


class Enlarge:
    """Makes a row large: thirty of them are far more than the object store holds."""

    def __call__(self, row: Row) -> Row:
        return {**row, "blob": np.full(20 * 2**20, row["value"], np.uint8)}


class Measure:
    """Reads a file and the large column, and lets that go."""

    def __init__(self, file: str):
        self.file = file

    def __call__(self, row: Row) -> Row:
        table = pq.read_table(self.file)
        return {"id": row["id"], "error": "", "value": int(row["blob"][-1]) + table.num_rows}


@pytest.mark.ray
@pytest.mark.parametrize(
    "resources",
    [
        {"cpus": 1, "actors": (1, 2)},
        pytest.param({"cpus": 0.5, "actors": 2}, marks=pytest.mark.slow),
        pytest.param({"threads": 2}, marks=pytest.mark.slow),
        pytest.param({"cpus": 0, "actors": (1, 3)}, marks=pytest.mark.slow),
        pytest.param({"cpus": 1, "actors": 1}, marks=pytest.mark.slow),
    ],
)
def test_two_cpus_suffice(resources: dict[str, Any], ray_local: None, tmp_path: Path) -> None:
    """Actors hold all CPUs, read files, and hand on more than fits the object store: everything ends all the same."""
    file = str(tmp_path / "table.parquet")
    pq.write_table(pa.table({"x": [1, 2, 3]}), file)
    wanted = ActorResources(**resources)
    chain = [ActorStage("enlarge", Enlarge, {}, wanted), ActorStage("measure", Measure, {"file": file}, wanted)]
    found = list(run_ray(rows(30), chain))
    assert {row["id"]: row["value"] for row in found} == {f"r{i}": i + 3 for i in range(30)}


@pytest.mark.ray
def test_a_chain_works_on_a_cluster_that_stays_smaller_than_it_may_get(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actors of the first stage must not take all there is, and be stopped by what they hand on."""
    file = str(tmp_path / "table.parquet")
    pq.write_table(pa.table({"x": [1, 2, 3]}), file)
    there = runner.read_capacity()
    grown = replace(there, fixed=there.fixed * 8)
    monkeypatch.setattr(runner, "read_capacity", lambda: grown)
    wanted = ActorResources(cpus=0.9, actors=(1, 8))
    chain = [ActorStage("enlarge", Enlarge, {}, wanted), ActorStage("measure", Measure, {"file": file}, wanted)]
    assert [pool.high for pool in fit_pools(chain, 30)] == [8, 8]
    found = list(run_ray(rows(30), chain))
    assert {row["id"]: row["value"] for row in found} == {f"r{i}": i + 3 for i in range(30)}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("resources", [{}, {"actors": (1, 4)}, {"cpus": 0.4, "actors": (1, 2)}, {"threads": 2}])
def test_three_teachers_and_a_commit_stage_on_two_cpus(resources: dict[str, Any], ray_local: None) -> None:
    wanted = ActorResources(**resources)
    chain = [ActorStage(f"add-{n}", Add, {"amount": n}, wanted) for n in (1, 10, 100)]
    chain.append(ActorStage("commit", Add, {"amount": 1000}, ActorResources(gpus=0, actors=1)))
    found = list(run_ray(rows(12), chain))
    assert {row["id"]: row["value"] for row in found} == {f"r{i}": i + 1111 for i in range(12)}


@pytest.mark.ray
def test_pools_that_would_wait_for_each_other_are_refused(ray_local: None) -> None:
    chain = [ActorStage(f"add-{n}", Add, {"amount": n}, ActorResources(cpus=1, actors=(1, 2))) for n in (1, 10, 100)]
    with pytest.raises(UserError, match=r"^resources: add-1, add-10, add-100 ask for 3 CPUs at least, but Ray has 2"):
        list(run_ray(rows(2), chain))


class Sleep:
    def __call__(self, row: Row) -> Row:
        time.sleep(60)
        return row


@pytest.mark.ray
def test_a_stage_that_hangs_is_ended_in_words(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "execution_no_progress_timeout_s", 3)
    with pytest.raises(RunError, match=r"^sleep: no unit was finished for 3 s.*raise resources\.session\.no_progress"):
        list(run_ray(rows(1), [ActorStage("sleep", Sleep)]))


def test_waiting_for_a_node_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    size = combine([Node(2, 0)], [], Growth(((Node(8, 1), 4),), 4))
    assert (size.runs(1, 0), size.runs(0, 1)) == (True, False)
    say_waiting("recover", 0, 1)
    assert capsys.readouterr().out == "recover: waiting for a node with 0 CPUs and 1 GPUs\n"
