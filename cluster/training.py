"""Running a Ray Train worker group for squeeze and evaluate."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import ray
import torch

from cluster import storage
from cluster.errors import PrismError, RunError, UserError
from cluster.resources import TrainResources
from cluster.session import cluster_totals


def run_trainer(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    resources: TrainResources,
    *,
    name: str,
    storage_uri: str,
    max_failures: int = 2,
) -> None:
    """Run ``loop(config)`` on every worker of a ``TorchTrainer`` and wait for it.

    A run of the same ``name`` and ``storage_uri`` that was cut short goes on from its last reported
    checkpoint (``ray.train.get_checkpoint()``).

    Args:
        loop: importable function.
        config: what it is called with: plain values such as paths, ids and options.
        resources: of the worker group.
        name: of the run, unique under ``storage_uri``.
        storage_uri: folder for checkpoints.
        max_failures: so often the group is started again after a worker died.

    Raises:
        PrismError: the one that ``loop`` raised, in its own words.
        RunError: the workers failed otherwise.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    total_cpus, total_gpus = cluster_totals()
    use_gpu = resources.gpu if resources.gpu is not None else total_gpus > 0
    for kind, total, asked in (
        ("CPUs", total_cpus, resources.workers * resources.cpus),
        ("GPUs", total_gpus, resources.workers * use_gpu),
    ):
        # Ray would wait for them without end.
        if asked > total + 1e-6:
            raise UserError(
                f"resources: training {name} asks for {asked:g} {kind}, but Ray has {total:g}; "
                "lower workers, cpus or gpu"
            )
    threads = resources.threads or max(1, int(total_cpus) // resources.workers)
    fs, path = storage.resolve(storage_uri)
    filesystem = None
    if not storage.is_local(storage_uri):
        import pyarrow.fs

        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    trainer = TorchTrainer(
        _Loop(loop, threads),
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": resources.cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        # Ray would start the group again after any exception, a user's mistake too; we do after lost workers.
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    for attempt in range(max_failures + 1):
        try:
            trainer.fit()
            return
        except Exception as error:
            found = _find_prism_error(error)
            if found:
                raise found from None
            if attempt == max_failures or not _lost_worker(error):
                raise RunError(
                    f"{name}: training failed ({_last_line(error)}); run the same command again to resume"
                ) from error


class _Loop:
    """The worker's loop with its thread cap."""

    def __init__(self, loop: Callable[[dict[str, Any]], None], threads: int):
        self.loop, self.threads = loop, threads

    def __call__(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(self.threads)
        os.environ["OMP_NUM_THREADS"] = str(self.threads)
        self.loop(config)


def _find_prism_error(error: BaseException) -> PrismError | None:
    """The user's error inside Ray's wrappers, whichever attribute holds it."""
    seen: set[int] = set()
    todo: list[Any] = [error]
    while todo:
        item = todo.pop()
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, ray.exceptions.RayTaskError) and isinstance(item.cause, PrismError):
            kind = UserError if isinstance(item.cause, UserError) else RunError
            return kind(str(item.cause.args[0] if item.cause.args else item.cause))
        if isinstance(item, PrismError):
            return item
        todo += [getattr(item, name, None) for name in ("__cause__", "__context__", "cause")]
        todo += list((getattr(item, "worker_failures", None) or {}).values())
    return None


def _lost_worker(error: BaseException) -> bool:
    """Whether a worker died, by Ray's word, rather than its code having raised."""
    failures = (getattr(error, "worker_failures", None) or {}).values()
    return any(type(failure).__module__.partition(".")[0] == "ray" for failure in failures)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
