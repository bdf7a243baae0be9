"""How many units at the same time a machine recovers fastest: a short probe with worker processes.

A unit that leaves a device idle for part of its step (small images on a GPU, passes on a CPU that do not scale with
threads) leaves room for another one. Workers are processes, as a run's actors are, so that a unit computes what it
computes alone.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from cluster.errors import RunError
from stages.data import DataSpec
from stages.recover.options import RecoverOptions
from stages.recover.timing import TimedStep
from stages.recover.unit import RecoverUnit
from stages.teachers.options import TeacherSpec

# Units on one GPU at the same time that are tried.
GPU_WORKERS = (1, 2, 4)


@dataclass(frozen=True)
class Layout:
    """Workers on one device.

    Attributes:
        workers: processes, a unit each.
        threads: of torch in each.
    """

    workers: int
    threads: int


def layouts(device: torch.device) -> list[Layout]:
    """Those to try: 1, 2 or 4 workers on a GPU; on CPUs all cores, shared among more and more threads a worker."""
    if device.type == "cuda":
        return [Layout(workers, 1) for workers in GPU_WORKERS]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    powers = [2**power for power in range(cores.bit_length()) if 2**power < cores]
    return [Layout(max(1, cores // threads), threads) for threads in [*powers, cores]]


def probe(
    unit: RecoverUnit,
    specs: Mapping[str, TeacherSpec],
    data: DataSpec,
    options: RecoverOptions,
    device: torch.device,
    layout: Layout,
    steps: int = 1,
    seconds: float = 5.0,
) -> float | None:
    """Image-steps a second of all workers of a layout together.

    Args:
        unit: see ``TimedStep``, as the next four.
        specs: of the teachers.
        data: of the images.
        options: of recovery.
        device: where.
        layout: the workers.
        steps: made at a time; several where each has teachers of its own.
        seconds: as long, after every worker has made as many steps.

    Returns:
        None: they do not fit into the memory.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(layout.workers)
    work = unit, dict(specs), data, options, str(device), layout.threads, steps, seconds
    with ProcessPoolExecutor(layout.workers, context, initializer=_meet_at, initargs=(barrier,)) as pool:
        found = [pool.submit(_rate, *work) for _ in range(layout.workers)]
        errors = [error for error in (future.exception() for future in found) if error]
        # The others' errors only say that one had an error.
        first = next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), None)
    if isinstance(first, torch.OutOfMemoryError | MemoryError | BrokenProcessPool):
        return None
    if errors:
        raise first or RunError("a worker of the probe did not get ready; run again")
    return sum(future.result() for future in found)


_barrier: threading.Barrier | None = None


def _meet_at(barrier: threading.Barrier) -> None:
    """For a worker: where it meets the others."""
    global _barrier
    _barrier = barrier


def _rate(
    unit: RecoverUnit,
    specs: Mapping[str, TeacherSpec],
    data: DataSpec,
    options: RecoverOptions,
    device: str,
    threads: int,
    steps: int,
    seconds: float,
) -> float:
    """Of this worker, in its own process."""
    assert _barrier is not None
    torch.set_num_threads(threads)
    try:
        step = TimedStep(unit, specs, data, options, torch.device(device))
        step.ours(steps)
    except BaseException:
        _barrier.abort()
        raise
    _barrier.wait()
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        step.ours(steps).sum().item()
        done += steps
    return len(unit.classes) * done / spent
