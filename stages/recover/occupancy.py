"""How many units at the same time a machine recovers fastest: a short probe with worker processes.

A unit that leaves a device idle for part of its step (small images on a GPU, passes on a CPU that do not scale with
threads) leaves room for another one. Workers are processes, as a run's actors are, so that a unit computes what it
computes alone.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from cluster.errors import PrismError, RunError, UserError, first_line
from cluster.resources import WORKER_BYTES
from stages.data import DataSpec
from stages.recover.options import RecoverOptions
from stages.recover.timing import TimedStep
from stages.recover.unit import RecoverUnit
from stages.teachers.options import TeacherSpec

# Units on one GPU at the same time that are tried.
GPU_WORKERS = (1, 2, 4)
# Of a GPU's memory that workers who share it may fill: a probe lasts for minutes, a run for hours.
HEADROOM = 0.9
# What more workers have to gain, which take more memory, too.
MARGIN = 0.05
# For one of them to get ready, which may have to compile.
PATIENCE_S = 1800.0
# What the libraries say where memory is lacking, beside exceptions of their own for it.
NO_MEMORY = ("out of memory", "allocate memory", "alloc_failed")


@dataclass(frozen=True)
class Sharing:
    """A device among workers.

    Attributes:
        workers: processes, a unit each.
        threads: of torch in each.
    """

    workers: int
    threads: int


def sharings(device: torch.device, cpus: int) -> list[Sharing]:
    """Those to try, from few workers to many.

    Args:
        device: on a GPU 1, 2 or 4 workers.
        cpus: else all of them, as evenly shared as threads can be that are a power of two; no more workers than the
            machine has memory for.
    """
    if device.type == "cuda":
        return [Sharing(workers, 1) for workers in GPU_WORKERS]
    most = max(1, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(WORKER_BYTES))
    even = [cpus, *(2**power for power in reversed(range(cpus.bit_length())) if 2**power < cpus)]
    return [Sharing(cpus // threads, threads) for threads in even if not cpus % threads and cpus // threads <= most]


def compare(
    unit: RecoverUnit,
    specs: Mapping[str, TeacherSpec],
    data: DataSpec,
    options: RecoverOptions,
    device: torch.device,
    among: Iterable[Sharing],
    steps: int,
) -> dict[Sharing, float | None]:
    """Each one's rate, from few workers to many, up to the first that does not fit into the memory; see ``probe``."""
    tried: dict[Sharing, float | None] = {}
    for sharing in among:
        tried[sharing] = probe(unit, specs, data, options, device, sharing, steps)
        if tried[sharing] is None:
            break
    return tried


def fastest(tried: Mapping[Sharing, float | None]) -> tuple[Sharing, float] | None:
    """The first that fits and is as fast as the best, give or take ``MARGIN``, and its rate."""
    rates = {sharing: rate for sharing, rate in tried.items() if rate is not None}
    enough = max(rates.values(), default=0.0) / (1 + MARGIN)
    return next(((sharing, rate) for sharing, rate in rates.items() if rate >= enough), None)


def probe(
    unit: RecoverUnit,
    specs: Mapping[str, TeacherSpec],
    data: DataSpec,
    options: RecoverOptions,
    device: torch.device,
    sharing: Sharing,
    steps: int,
    turns: int = 3,
) -> float | None:
    """Image-steps a second of all workers together.

    Args:
        unit: see ``TimedStep``, as the next four.
        specs: of the teachers.
        data: of the images.
        options: of recovery.
        device: where.
        sharing: the workers.
        steps: of a turn; so many that what begins and ends a unit does not count for much.
        turns: that each worker makes, after one that does not count.

    Returns:
        None: they do not fit into the memory.

    Raises:
        UserError: a teacher cannot be built or compiled.
        RunError: a worker failed for another reason.
    """
    if device.type == "cuda":
        # What this process keeps for later is the workers' now.
        gc.collect()
        torch.cuda.empty_cache()
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(sharing.workers)
    work = unit, dict(specs), data, options, str(device), sharing.threads, steps, turns
    workers: list[tuple[Connection, BaseProcess]] = []
    patience = 0.0
    try:
        for _ in range(sharing.workers):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(there, barrier, *work), daemon=True)
            process.start()
            # Of the worker alone, so that its end shows.
            there.close()
            workers.append((here, process))
        total = _total(workers)
        # All have answered, and tidy up.
        patience = 0.0 if total is None else 10.0
        return total
    finally:
        for _, worker in workers:
            worker.join(patience)
            # Those that wait for one that will not come.
            worker.terminate()
            worker.join()


def _total(workers: list[tuple[Connection, BaseProcess]]) -> float | None:
    """Sum of the rates as they come in; see ``probe``."""
    total, left = 0.0, list(workers)
    while left:
        ready = wait([connection for connection, _ in left])
        answered = [worker for worker in left if worker[0] in ready]
        left = [worker for worker in left if worker not in answered]
        for connection, process in answered:
            try:
                rate, error = connection.recv()
            except EOFError:
                process.join()
                # So ends Linux what takes too much.
                if process.exitcode == -signal.SIGKILL:
                    return None
                error = RunError(f"it ended with exit code {process.exitcode}")
                rate = None
            if isinstance(error, UserError):
                raise error
            if error:
                raise RunError(f"a worker of the probe failed ({error}); mend that, or leave the probe out")
            if rate is None:
                return None
            total += rate
    return total


def _work(
    answer: Connection,
    barrier: threading.Barrier,
    unit: RecoverUnit,
    specs: Mapping[str, TeacherSpec],
    data: DataSpec,
    options: RecoverOptions,
    device: str,
    threads: int,
    steps: int,
    turns: int,
) -> None:
    """A worker. Answers with its rate, None for want of memory, and an error of the project's if there was another."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if device.startswith("cuda") and barrier.parties > 1:
            torch.cuda.set_per_process_memory_fraction(HEADROOM / barrier.parties)
        step = TimedStep(unit, specs, data, options, torch.device(device))
        step.ours(steps).sum().item()
        barrier.wait(PATIENCE_S)
        start = time.perf_counter()
        for _ in range(turns):
            step.ours(steps).sum().item()
        answer.send((len(unit.classes) * steps * turns / (time.perf_counter() - start), None))
    except PrismError as error:
        answer.send((None, error))
    except Exception as error:
        text = str(error).lower()
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in text for words in NO_MEMORY)
        # Not the error itself, for not every one survives the way.
        answer.send((None, None if memory else RunError(first_line(error))))


def _end_with_parent() -> None:
    """Workers must not keep a GPU when the process that asked was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
