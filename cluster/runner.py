"""Two ways to drive the same stages over the same units: in this process, or as a Ray Data pipeline.

A stage is a callable class ``Stage(**kwargs)`` whose instances map one row to one row. It is built once per actor
(teachers load there and stay) and commits what it produces itself; what it returns is small. A row is a flat dict
of strings, numbers and numpy arrays with at least ``id`` (str) and ``error`` (str, empty while all is well).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from cluster import preemption
from cluster.attempts import Attempts
from cluster.capacity import Capacity, read_capacity
from cluster.errors import PrismError, RunError, UserError, redact
from cluster.metrics import SPENT, WorkerMetrics
from cluster.progress import console
from cluster.resources import ActorResources, Pool, fit_actors

Row = dict[str, Any]
log = logging.getLogger("prism")
# Ray Data keeps about 10 KB in the driver for every block of a pipeline. More units than these take several, each with
# actors of its own, whose start is little beside thousands of units.
WINDOW = 2500


@dataclass(frozen=True)
class ActorStage:
    """One actor pool of a pipeline.

    Attributes:
        name: shown by Ray and in messages.
        factory: callable class, or function that returns a callable; must be importable by the workers.
        kwargs: paths, ids and options for the factory; never weights or images.
        resources: of one actor and of the pool.
        attempts: bounds how often a row may end its worker, for stages that do not see to it themselves.
        starts: bounds how often a row may meet a worker whose device is broken; None: ``attempts`` do.
    """

    name: str
    factory: Callable[..., Callable[[Row], Row]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    resources: ActorResources = field(default_factory=ActorResources)
    attempts: Attempts | None = None
    starts: Attempts | None = None


class Runner(Protocol):
    """Drives rows through stages and yields them as they finish, in any order."""

    def __call__(self, rows: list[Row], stages: list[ActorStage]) -> Iterator[Row]:
        """Rows after the last stage. A row whose stage raised carries the reason in ``error``."""
        ...


class Guarded:
    """A stage whose failures become rows: one bad unit must not stop the others.

    Errors made for users keep their words; anything else gets its type named and its traceback logged.
    """

    def __init__(self, stage: ActorStage):
        torch.set_num_threads(stage.resources.threads)
        self.name, self.attempts = stage.name, stage.attempts
        self.metrics = WorkerMetrics(stage.name, stage.resources.threads)
        self.inner: Callable[[Row], Row] | None = None
        self.starts = stage.starts or stage.attempts
        # Of what a user has to mend; all else may be the machine's, and another one better.
        self.lasting = False
        # An actor that cannot start would be restarted for ever; its units say why instead.
        self.broken = self._reason(lambda: self._start(stage), "start-up")
        # After the start, so that a notice during it ends the process in Ray's way.
        preemption.listen()

    def __call__(self, row: Row) -> Row:
        """Run the stage on one row, which carries its starts and what all stages spent; a failed one passes through."""
        if row["error"]:
            return row
        done: list[Row] = []
        spent = {name: row[name] for name in SPENT if name in row}
        starts = {"attempt": row["attempt"]} if "attempt" in row else {}
        with self.metrics.unit(spent):
            reason = self._broken(row["id"]) or self._reason(lambda: done.append(self._run(row)), row["id"])
        return starts | ({"id": row["id"], "error": f"{self.name}: {reason}"} if reason else done[0]) | spent

    def _start(self, stage: ActorStage) -> None:
        try:
            self.inner = stage.factory(**stage.kwargs)
        except UserError:
            self.lasting = True
            raise

    def _broken(self, task: str) -> str:
        """Why no row can be worked on, empty where it can.

        A machine with a broken device would be through all rows in a moment. So the process ends, and Ray gives the row
        to another, until the row has met too many such.
        """
        if self.broken and not self.lasting and self.starts is not None and preemption.is_worker():
            with contextlib.suppress(RunError):
                self.starts.begin(task, 1)
                preemption.leave()
        return self.broken

    def _run(self, row: Row) -> Row:
        if self.attempts is None:
            return self._work(row)
        attempt = self.attempts.begin(row["id"], 1)
        out = self._work(row)
        attempt.finish()
        return out | {"attempt": row.get("attempt", 1) + attempt.number - 1}

    def _work(self, row: Row) -> Row:
        """Run the stage; a device that fails ends the process, to which it is lost, as in ``_broken``."""
        assert self.inner is not None
        try:
            return self.inner(row)
        except torch.AcceleratorError:
            if self.starts is not None and preemption.is_worker():
                log.error("%s: %s, moved elsewhere\n%s", self.name, row["id"], redact(traceback.format_exc()))
                preemption.leave()
            raise

    def _reason(self, action: Callable[[], object], what: str) -> str:
        """Why ``action`` failed, empty when it did not."""
        try:
            action()
        except PrismError as error:
            return str(error)
        except Exception as error:
            log.error("%s: %s\n%s", self.name, what, redact(traceback.format_exc()))
            return redact(f"{type(error).__name__}: {error}")
        return ""


def run_serial(rows: list[Row], stages: list[ActorStage]) -> Iterator[Row]:
    """Everything in this process, one unit after the other: tests, debugging, reference bytes."""
    return _one_by_one(rows, stages, Guarded)


def run_bare(rows: list[Row], stages: list[ActorStage]) -> Iterator[Row]:
    """The same, but the first failure is raised as it is: for callers to whom it matters what failed."""
    return _one_by_one(rows, stages, _bare)


def _bare(stage: ActorStage) -> Callable[[Row], Row]:
    torch.set_num_threads(stage.resources.threads)
    return stage.factory(**stage.kwargs)


def _one_by_one(
    rows: list[Row], stages: list[ActorStage], make: Callable[[ActorStage], Callable[[Row], Row]]
) -> Iterator[Row]:
    threads = torch.get_num_threads()
    try:
        ready = [make(stage) for stage in stages]
        for row in rows:
            for index, stage in enumerate(ready):
                torch.set_num_threads(stages[index].resources.threads)
                row = stage(row)
            yield row
    finally:
        torch.set_num_threads(threads)


def run_ray(rows: list[Row], stages: list[ActorStage]) -> Iterator[Row]:
    """One Ray Data pipeline: every row is a block of its own, every stage a pool of actors that pull blocks.

    Needs a running session (``cluster.session.ray_session``).
    """
    windows = -(-len(rows) // WINDOW)
    # All of about the same size: the last one must not be of a few units.
    bounds = [len(rows) * i // windows for i in range(windows + 1)] if rows else []
    for start, stop in itertools.pairwise(bounds):
        yield from _run_pipeline(rows[start:stop], stages)


def _run_pipeline(rows: list[Row], stages: list[ActorStage]) -> Iterator[Row]:
    import ray.data

    # from_items, because Parquet sources collapse small files into one block and their readers
    # starve behind actors that hold the CPUs.
    data: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    capacity = read_capacity()
    alone = len(stages) == 1
    _ask_for_nodes(alone=alone)
    for stage, pool in zip(stages, _fit(stages, len(rows), capacity), strict=True):
        if not capacity.runs(pool.cpus, pool.gpus):
            say_waiting(stage.name, pool.cpus, pool.gpus)
        data = data.map(
            _named(stage.name),  # type: ignore[arg-type]
            fn_constructor_args=(stage,),
            compute=_strategy(pool, alone=alone),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
        )
    try:
        yield from data.iter_rows()
    except Exception as error:
        names = ", ".join(stage.name for stage in stages)
        raise RunError(
            f"{names}: {_gave_up(error)}; what is finished is kept, run the same command again to resume"
        ) from error


def _strategy(pool: Pool, *, alone: bool) -> Any:
    """How Ray Data fills a pool.

    A stage by itself asks for all its actors at once: those for which there is no room yet are what makes an autoscaler
    add nodes. A pool that Ray Data grows asks for a second node only after a unit was finished, and for few at a time.
    The others work meanwhile, and Ray Data ends actors that no unit is left for. One unit each, for a second that waits
    behind the first would keep an actor that comes later idle.

    The stages of a chain start with the smallest pools and grow: were all asked for at once, actors of the first stages
    would take all of a cluster that stays smaller than it may get, and nothing would ever leave the last. Units wait
    behind others there, which is what makes Ray Data add actors.
    """
    import ray.data

    if alone:
        return ray.data.ActorPoolStrategy(size=pool.high, max_tasks_in_flight_per_actor=1)
    return ray.data.ActorPoolStrategy(min_size=pool.low, max_size=pool.high)


def _ask_for_nodes(*, alone: bool) -> None:
    """Who asks an autoscaler for nodes in the next pipeline: a stage's waiting actors, or Ray Data for a chain.

    Ray Data asks for what would double the speed of the slowest stage, once it knows how long units take, and holds on
    to the nodes until the last unit is done: right for a chain of many short units, wrong for units of an hour.
    """
    if alone:
        os.environ["RAY_DATA_CLUSTER_AUTOSCALER"] = "V2"  # made one that never asks, see cluster.session
    else:
        os.environ.pop("RAY_DATA_CLUSTER_AUTOSCALER", None)


def _gave_up(error: Exception) -> str:
    import ray.data.exceptions

    if isinstance(error, ray.data.exceptions.ExecutionTimeoutError):
        limit = ray.data.DataContext.get_current().execution_no_progress_timeout_s
        return (
            f"no unit was finished for {limit:g} s, so Ray gave up; where units take longer, or nodes take longer to "
            "come, raise resources.session.no_progress_timeout_s"
        )
    reason = str(error).strip().splitlines()
    return f"Ray gave up ({reason[-1] if reason else type(error).__name__})"


def _named(name: str) -> type[Guarded]:
    """``Guarded`` under the stage's name, which is what Ray's dashboard and messages show."""
    return type("".join(w.title() for w in name.replace("-", " ").split()), (Guarded,), {})


def fit_pools(stages: list[ActorStage], num_rows: int) -> list[Pool]:
    """The actors of every stage on the running cluster at its full size; see ``fit_actors``.

    Raises:
        UserError: the smallest pools can never fit.
    """
    return _fit(stages, num_rows, read_capacity())


def _fit(stages: list[ActorStage], num_rows: int, capacity: Capacity) -> list[Pool]:
    return fit_actors([(stage.name, stage.resources) for stage in stages], num_rows, capacity)


def say_waiting(name: str, cpus: float, gpus: float) -> None:
    """Tell that no node runs yet on which a worker fits: it may take minutes until the autoscaler has started one."""
    console.print(f"{name}: waiting for a node with {cpus:g} CPUs and {gpus:g} GPUs", soft_wrap=True)


def failures(rows: Iterable[Row]) -> list[Row]:
    """The rows that carry an error."""
    return [row for row in rows if row["error"]]
