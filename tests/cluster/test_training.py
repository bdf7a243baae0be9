"""Ray Train worker groups: errors in their own words, retries, resume by name."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.errors import RunError, UserError
from cluster.resources import TrainResources
from cluster.training import _find_prism_error, _lost_worker, run_trainer

# Workers cannot import test modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def mistaken(config: dict[str, Any]) -> None:
    with Path(config["log"]).open("a") as log:
        log.write("try\n")
    raise UserError("teachers.a: no weights at /nowhere; correct the path")


def broken(config: dict[str, Any]) -> None:
    with Path(config["log"]).open("a") as log:
        log.write("try\n")
    log.write(str(1 / 0))


def crashes_once(config: dict[str, Any]) -> None:
    """Counts to four, checkpointing each; the process dies after the second."""
    import ray.train

    start = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            start = int(Path(folder, "count").read_text())
    for count in range(start + 1, 5):
        with Path(config["log"]).open("a") as log:
            import torch

            log.write(f"{count} threads {torch.get_num_threads()} {os.environ['OMP_WAIT_POLICY']}\n")
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "count").write_text(str(count))
            ray.train.report({"count": count}, checkpoint=ray.train.Checkpoint.from_directory(folder))
        if count == 2:
            # Waits until the controller knows of the report; it asks every two seconds.
            ray.train.get_all_reported_checkpoints()
            os._exit(1)


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


@pytest.mark.ray
def test_users_error_keeps_its_words_and_is_not_retried(tmp_path: Path, ray_local: None) -> None:
    log = tmp_path / "log"
    resources = TrainResources(threads=1)
    with pytest.raises(UserError) as caught:
        run_trainer(mistaken, {"log": str(log)}, resources, name="mistaken", storage_uri=str(tmp_path / "runs"))
    assert str(caught.value) == "teachers.a: no weights at /nowhere; correct the path"
    assert log.read_text() == "try\n"


@pytest.mark.ray
def test_bug_in_the_loop_is_not_retried(tmp_path: Path, ray_local: None) -> None:
    with pytest.raises(RunError, match=r"^broken: training failed \(ZeroDivisionError.*again to resume$"):
        run_trainer(
            broken, {"log": str(tmp_path / "log")}, TrainResources(threads=1), name="broken", storage_uri=str(tmp_path)
        )
    assert (tmp_path / "log").read_text() == "try\n"


@pytest.mark.ray
def test_crashed_run_goes_on_from_its_last_checkpoint_by_name(tmp_path: Path, ray_local: None) -> None:
    log = tmp_path / "log"
    arguments = (crashes_once, {"log": str(log)}, TrainResources(threads=1))
    places = {"name": "count", "storage_uri": str(tmp_path / "runs")}
    with pytest.raises(RunError, match=r"^count: training failed .*; run the same command again to resume$"):
        run_trainer(*arguments, **places, max_failures=0)
    assert log.read_text() == "1 threads 1 PASSIVE\n2 threads 1 PASSIVE\n"
    run_trainer(*arguments, **places)
    assert log.read_text() == "".join(f"{count} threads 1 PASSIVE\n" for count in (1, 2, 3, 4))
