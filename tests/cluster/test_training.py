"""Ray Train worker groups: jobs handed out, errors in their own words, retries."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.capacity import Capacity, Growth, Node, combine
from cluster.errors import RunError, UserError
from cluster.resources import TrainResources, fit_groups
from cluster.training import JobQueue, _find_prism_error, _lost_worker, run_trainers, settle
from cluster.worker import Worker

# Workers cannot import test modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def note(config: dict[str, Any], line: str) -> None:
    with Path(config["log"]).open("a") as log:
        log.write(f"{line}\n")


def mistaken(config: dict[str, Any], jobs: Iterator[int], worker: Worker) -> None:
    note(config, f"try {next(jobs)}")
    raise UserError("teachers.a: no weights at /nowhere; correct the path")


def broken(config: dict[str, Any], jobs: Iterator[int], worker: Worker) -> None:
    note(config, f"try {next(jobs)}")
    note(config, str(1 / 0))


def crashes_once(config: dict[str, Any], jobs: Iterator[int], worker: Worker) -> None:
    """The process dies in job 1, once."""
    import torch

    for job in jobs:
        note(config, f"{job} threads {torch.get_num_threads()} {os.environ['OMP_WAIT_POLICY']}")
        if job == 1 and not Path(config["log"] + ".crashed").exists():
            Path(config["log"] + ".crashed").touch()
            os._exit(1)


def waits_for_the_other(config: dict[str, Any], jobs: Iterator[int], worker: Worker) -> None:
    """Ends only where two groups work at the same time; the second job of the first group fails."""
    for count, job in enumerate(jobs):
        Path(config["log"], f"{job}").touch()
        end = time.monotonic() + 120
        while not (Path(config["log"], "0").exists() and Path(config["log"], "1").exists()):
            if time.monotonic() > end:
                raise RunError("alone")
            time.sleep(0.1)
        if job == 2:
            raise RunError(f"job 2 was number {count} of its group")
        Path(config["log"], f"{job} done").touch()


def ranks(config: dict[str, Any], jobs: Iterator[int], worker: Worker) -> None:
    """Job 1 fails on the second worker alone, while the first waits for it."""
    for job in jobs:
        Path(config["log"], f"job {job} rank {worker.rank}").touch()
        if (job, worker.rank) == (1, 1):
            raise RunError("rank 1 of job 1")


def test_a_restarted_group_gets_its_job_again() -> None:
    queue = JobQueue(3)
    assert [queue.take("a", False), queue.take("b", False)] == [0, 1]
    assert queue.take("a", False) == 0
    assert queue.take("b", True) == 2
    assert queue.take("a", True) is None
    assert queue.take("b", False) == 2
    assert queue.take("b", True) is None


def test_what_a_lost_group_held_comes_last() -> None:
    queue = JobQueue(3)
    assert [queue.take("a", False), queue.take("b", False)] == [0, 1]
    queue.give_up("a")
    assert [queue.take("b", True) for _ in range(3)] == [2, 0, None]


GIB = 2**30


def capacity(cpus: float, gpus: float, node_cpus: float, memory: float) -> Capacity:
    """Of nodes alike."""
    count = cpus // node_cpus
    node = Node(node_cpus, gpus / count, memory / count)
    return combine([node], [node] * int(count - 1), Growth((), 0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": 0.5, "workers": 2}, r"gpus = 0\.5, but it must be 1, for the workers of a training cannot share"),
        ({"gpus": 2}, "gpus = 2, but it must be at most 1"),
    ],
)
def test_what_a_training_cannot_have(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        TrainResources(**options)


@pytest.mark.parametrize(
    ("resources", "jobs", "cluster", "expected"),
    [
        # cluster: CPUs, GPUs, CPUs of a node, memory; expected: groups, threads, CPUs reserved, GPUs of a worker
        ({}, 3, (2, 0, 2, 64 * GIB), (2, 1, 0.9, 0)),
        ({}, 1, (8, 0, 8, 64 * GIB), (1, 8, 7.2, 0)),
        ({}, 5, (16, 0, 16, 64 * GIB), (5, 3, 2.7, 0)),
        # Little memory makes groups fewer, not their threads more: results depend on those.
        ({}, 5, (16, 0, 16, 6 * GIB), (2, 3, 2.7, 0)),
        ({}, 5, (16, 0, 16, GIB), (1, 3, 2.7, 0)),
        ({"parallel": 3}, 5, (16, 0, 16, GIB), (3, 5, 4.5, 0)),
        ({}, 3, (32, 0, 8, 256 * GIB), (3, 8, 7.2, 0)),
        ({"threads": 4}, 9, (16, 0, 16, 64 * GIB), (4, 4, 3.6, 0)),
        ({"threads": 4}, 9, (2, 0, 2, 64 * GIB), (1, 4, 1.8, 0)),
        ({"workers": 2}, 9, (2, 0, 2, 64 * GIB), (1, 1, 0.9, 0)),
        ({"parallel": 3}, 9, (2, 0, 2, 64 * GIB), (3, 1, 0.6, 0)),
        ({"parallel": 8}, 2, (16, 0, 16, 64 * GIB), (2, 8, 7.2, 0)),
        ({"cpus": 0.5}, 9, (2, 0, 2, 64 * GIB), (2, 1, 0.5, 0)),
        ({}, 9, (64, 4, 16, GIB), (4, 16, 0.5, 1)),
        ({"workers": 4}, 9, (64, 8, 64, GIB), (2, 8, 0.5, 1)),
        ({"cpus": 8}, 9, (16, 4, 16, GIB), (2, 8, 8, 1)),
        ({"gpus": 0}, 1, (64, 4, 16, 64 * GIB), (1, 16, 14.4, 0)),
        # Shares of a device: as many trainings as these and the CPUs give.
        ({"gpus": 0.25}, 9, (16, 1, 16, 64 * GIB), (4, 4, 0.5, 0.25)),
        ({"gpus": 0.25}, 9, (16, 1, 16, 6 * GIB), (2, 4, 0.5, 0.25)),
        ({"gpus": 0.25}, 9, (1, 1, 1, 64 * GIB), (2, 1, 0.5, 0.25)),
        ({"gpus": 0.5, "parallel": 3}, 9, (64, 4, 16, GIB), (3, 16, 0.5, 0.5)),
    ],
)
def test_groups_share_the_cluster(resources, jobs, cluster, expected) -> None:
    found = fit_groups(TrainResources(**resources), jobs, "resources.squeeze", capacity(*cluster))
    assert (found.groups, found.threads, pytest.approx(found.cpus), found.gpus) == expected
    assert found.workers == resources.get("workers", 1)


@pytest.mark.parametrize(
    ("nodes", "jobs", "expected"),
    [
        # 6 threads, the CPUs over the jobs, fit the large node alone, twice.
        ([Node(16, 0), *[Node(4, 0)] * 4], 5, (5, 4)),
        # CPUs beside which there is no GPU are none of a training's.
        ([Node(64, 0), Node(8, 1), Node(8, 1)], 2, (2, 8)),
        ([Node(16, 4), Node(8, 1)], 5, (5, 4)),
    ],
)
def test_threads_let_all_trainings_find_a_node(nodes, jobs, expected) -> None:
    found = fit_groups(TrainResources(), jobs, "resources.squeeze", combine(nodes, [], Growth((), 0)))
    assert (found.groups, found.threads) == expected


@pytest.mark.parametrize(("resources", "kind"), [({"workers": 9}, "4.5 CPUs"), ({"gpus": 1}, "1 GPUs")])
def test_a_group_that_cannot_fit_is_refused(resources, kind) -> None:
    with pytest.raises(UserError, match=f"^resources.squeeze: a training asks for {kind}, but Ray has"):
        fit_groups(TrainResources(**resources), 1, "resources.squeeze", capacity(2, 0, 2, GIB))


def test_users_error_is_found_inside_any_wrapping() -> None:
    inner = UserError("data: not there; import it")
    wrapped = RuntimeError("worker failed")
    wrapped.__cause__ = ValueError("context")
    wrapped.__cause__.__context__ = inner
    assert _find_prism_error(wrapped) is inner

    group = RuntimeError("group failed")
    group.worker_failures = {0: ValueError("nothing"), 1: wrapped}  # type: ignore[attr-defined]
    assert _find_prism_error(group) is inner


def test_other_errors_are_not_users_and_cycles_end() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert _find_prism_error(first) is None


def test_only_lost_workers_are_worth_another_attempt() -> None:
    group = RuntimeError("group failed")
    group.worker_failures = {0: ValueError("a bug")}  # type: ignore[attr-defined]
    assert not _lost_worker(group)
    # With several workers the survivors raise as well.
    group.worker_failures = {0: RuntimeError("connection reset"), 1: ray.exceptions.ActorDiedError()}  # type: ignore[attr-defined]
    assert _lost_worker(group)
    assert not _lost_worker(RuntimeError("no group at all"))


def run(loop, tmp_path: Path, jobs: int, resources: dict[str, int], **options: Any) -> None:
    config = {"log": str(options.pop("log", tmp_path / "log"))}
    settled = settle(TrainResources(**resources), jobs, "resources.squeeze")
    run_trainers(loop, config, jobs, settled, name="nets", storage_uri=str(tmp_path / "ray"), **options)


@pytest.mark.ray
def test_users_error_keeps_its_words_and_is_not_retried(tmp_path: Path, ray_local: None, capsys) -> None:
    with pytest.raises(UserError) as caught:
        run(mistaken, tmp_path, 1, {"threads": 1})
    assert str(caught.value) == "teachers.a: no weights at /nowhere; correct the path"
    assert (tmp_path / "log").read_text() == "try 0\n"
    # It is raised, and need not be said twice.
    assert "warning" not in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
def test_bug_in_the_loop_is_not_retried(tmp_path: Path, ray_local: None) -> None:
    with pytest.raises(RunError, match=r"^nets-0: training failed \(ZeroDivisionError.*again to resume$"):
        run(broken, tmp_path, 1, {"threads": 1})
    assert (tmp_path / "log").read_text() == "try 0\n"


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_whose_worker_died_is_done_again(tmp_path: Path, ray_local: None) -> None:
    with pytest.raises(RunError, match=r"^nets-0: training failed .*; run the same command again to resume$"):
        run(crashes_once, tmp_path, 3, {"threads": 1, "parallel": 1}, max_failures=0)
    assert (tmp_path / "log").read_text() == "0 threads 1 PASSIVE\n1 threads 1 PASSIVE\n"
    run(crashes_once, tmp_path, 3, {"threads": 1, "parallel": 1}, log=tmp_path / "again")
    assert (tmp_path / "again").read_text() == "".join(f"{job} threads 1 PASSIVE\n" for job in (0, 1, 1, 2))


@pytest.mark.ray
@pytest.mark.slow
def test_groups_work_at_the_same_time_and_one_that_fails_leaves_its_share(tmp_path: Path, ray_local: None) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(RunError, match="job 2 was number 1 of its group"):
        run(waits_for_the_other, tmp_path, 5, {"threads": 1})
    done = {path.name for path in (tmp_path / "log").glob("* done")}
    assert done == {"0 done", "1 done", "3 done", "4 done"}


@pytest.mark.ray
def test_all_workers_of_a_group_get_the_same_jobs_and_end_with_the_one_that_fails(
    tmp_path: Path, ray_local: None
) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(RunError, match="rank 1 of job 1"):
        run(ranks, tmp_path, 3, {"workers": 2, "threads": 1})
    assert sorted(p.name for p in (tmp_path / "log").iterdir()) == [f"job {j} rank {r}" for j in (0, 1) for r in (0, 1)]
    assert not (tmp_path / "ray").exists()
