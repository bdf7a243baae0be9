"""Running jobs in Ray Train worker groups, for squeeze and evaluate."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import storage
from cluster.capacity import read_capacity
from cluster.errors import PrismError, RunError, UserError, redact
from cluster.progress import console
from cluster.resources import Settled, TrainResources, fit_groups
from cluster.runner import say_waiting
from cluster.worker import Worker

# A group that worked for so long before it lost its workers did not lose them to its job.
STEADY_S = 600.0

Loop = Callable[[dict[str, Any], Iterator[int], Worker], None]
"""Called on every worker of a group with (config, indices of the jobs that the group gets, the worker)."""


class JobQueue:
    """Hands jobs to worker groups, each to one, as they get free.

    Args:
        jobs: how many.
    """

    def __init__(self, jobs: int):
        self._free = list(range(jobs))
        self._held: dict[str, int] = {}

    def take(self, group: str, finished: bool) -> int | None:
        """The next job of a group, None at the end.

        Args:
            group: name of the asking group.
            finished: whether it has finished the job it holds. A group that was started again has not, and gets the
                job at which its worker died once more.
        """
        if finished:
            self._held.pop(group, None)
        if group not in self._held:
            if not self._free:
                return None
            self._held[group] = self._free.pop(0)
        return self._held[group]

    def give_up(self, group: str) -> None:
        """A group has ended for good; what it held comes last, for it may end the next group as well."""
        if group in self._held:
            self._free.append(self._held.pop(group))


def run_trainers(
    loop: Loop,
    config: dict[str, Any],
    jobs: int,
    settled: Settled,
    *,
    name: str,
    storage_uri: str,
    max_failures: int = 2,
) -> None:
    """Run jobs in ``TorchTrainer`` worker groups that work at the same time, and wait for all of them.

    A group whose job raises ends; the others go on with what is left. A job whose workers were lost too often is tried
    by another group.

    Args:
        loop: importable function, see ``Loop``.
        config: what it is called with: plain values such as paths, ids and options.
        jobs: how many there are.
        settled: resources of the groups.
        name: of the groups, with their number; unique under ``storage_uri``.
        storage_uri: folder of Ray Train's own records, removed at the end.
        max_failures: so often in a row a group is started again after a worker died.

    Raises:
        PrismError: the first that ``loop`` raised, in its own words.
        RunError: the workers failed otherwise.
    """
    if not read_capacity().runs(settled.cpus, settled.gpus):
        # Ray Train asks for its nodes until they are there, however long that takes.
        say_waiting(name, settled.cpus, settled.gpus)
    # With the driver, without which nothing goes on anyway: other nodes may leave.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue: Any = ray.remote(num_cpus=0)(JobQueue).options(scheduling_strategy=here).remote(jobs)
    errors: list[Exception] = []

    def drive(group: str) -> None:
        try:
            _run_group(_Loop(loop, settled, queue, group), config, settled, group, storage_uri, max_failures)
        except Exception as error:
            if isinstance(error, WorkersLost):
                queue.give_up.remote(group)
            errors.append(error)
            # The last group's is raised below.
            if sum(driver.is_alive() for driver in drivers) > 1:
                console.print(f"warning: {error}", style="yellow", soft_wrap=True)

    names = [f"{name}-{index}" for index in range(min(settled.groups, jobs))]
    # Threads, for ``fit`` blocks; and in the main thread Ray Train would take Ctrl-C for itself, for good.
    drivers = [threading.Thread(target=drive, args=[group], daemon=True) for group in names]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    # Of no use to a later run, which goes by what the jobs left.
    storage.remove(storage_uri)
    if errors:
        raise errors[0]


class WorkersLost(RunError):
    """The workers of a group died again and again."""


def settle(resources: TrainResources, jobs: int, field: str) -> Settled:
    """Fill what the configuration leaves open, from the running cluster at its full size.

    Args:
        resources: asked for.
        jobs: of the whole run, done or not, so that one that was interrupted goes on with as many threads.
        field: names ``resources`` in errors.

    Raises:
        UserError: not even one group fits.
    """
    return fit_groups(resources, jobs, field, read_capacity())


def _run_group(
    loop: _Loop, config: dict[str, Any], settled: Settled, name: str, storage_uri: str, max_failures: int
) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    fs, path = storage.resolve(storage_uri)
    filesystem = None
    if not storage.is_local(storage_uri):
        import pyarrow.fs

        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    trainer = TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=settled.workers,
            use_gpu=settled.gpus > 0,
            resources_per_worker={"CPU": settled.cpus, **({"GPU": settled.gpus} if settled.gpus else {})},
        ),
        # Ray would start the group again after any exception, a user's mistake too; we do after lost workers.
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    failures = 0
    while True:
        start = time.monotonic()
        try:
            trainer.fit()
            return
        except Exception as error:
            found = _find_prism_error(error)
            if found:
                raise found from None
            lost = _lost_worker(error)
            # One that worked for a while was taken; a job that ends its workers does so again and again.
            failures = 1 if time.monotonic() - start > STEADY_S else failures + 1
            if failures > max_failures or not lost:
                kind = WorkersLost if lost else RunError
                raise kind(
                    f"{name}: training failed ({_last_line(error)}); run the same command again to resume"
                ) from error


class _Loop:
    """A worker's loop with its thread cap and the jobs of its group."""

    def __init__(self, loop: Loop, settled: Settled, queue: Any, group: str):
        self.loop, self.settled, self.queue, self.group = loop, settled, queue, group

    def __call__(self, config: dict[str, Any]) -> None:
        import ray.train
        import ray.train.torch

        torch.set_num_threads(self.settled.threads)
        os.environ["OMP_NUM_THREADS"] = str(self.settled.threads)
        context = ray.train.get_context()
        device, rank, world = str(ray.train.torch.get_device()), context.get_world_rank(), context.get_world_size()
        wrap = {"wrap": ray.train.torch.prepare_model} if world > 1 else {}
        worker = Worker(device, rank, world, gpus=self.settled.gpus, **wrap)
        self.loop(config, self._jobs(worker), worker)

    def _jobs(self, worker: Worker) -> Iterator[int]:
        """The same indices on every worker of the group."""
        finished = False
        while True:
            box = [ray.get(self.queue.take.remote(self.group, finished)) if worker.rank == 0 else None]
            if worker.world > 1:
                torch.distributed.broadcast_object_list(box)
            if box[0] is None:
                return
            yield box[0]
            finished = True


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
    lines = [line for line in redact(str(error)).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
