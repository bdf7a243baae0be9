"""Two ways to drive the same stages over the same units: in this process, or as a Ray Data pipeline.

A stage is a callable class ``Stage(**kwargs)`` whose instances map one row to one row. It is built once per actor
(teachers load there and stay) and commits what it produces itself; what it returns is small. A row is a flat dict
of strings, numbers and numpy arrays with at least ``id`` (str) and ``error`` (str, empty while all is well).
"""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from cluster.attempts import Attempts
from cluster.errors import PrismError, RunError, UserError, redact
from cluster.metrics import SPENT, WorkerMetrics
from cluster.resources import ActorResources
from cluster.session import cluster_totals

Row = dict[str, Any]
log = logging.getLogger("prism")


@dataclass(frozen=True)
class ActorStage:
    """One actor pool of a pipeline.

    Attributes:
        name: shown by Ray and in messages.
        factory: callable class, or function that returns a callable; must be importable by the workers.
        kwargs: paths, ids and options for the factory; never weights or images.
        resources: of one actor and of the pool.
        attempts: bounds how often a row may end its worker, for stages that do not see to it themselves.
    """

    name: str
    factory: Callable[..., Callable[[Row], Row]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    resources: ActorResources = field(default_factory=ActorResources)
    attempts: Attempts | None = None


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
        # An actor that cannot start would be restarted for ever; its units say why instead.
        self.broken = self._reason(lambda: setattr(self, "inner", stage.factory(**stage.kwargs)), "start-up")

    def __call__(self, row: Row) -> Row:
        """Run the stage on one row, which carries what all stages spent on it; one that failed passes through."""
        if row["error"]:
            return row
        done: list[Row] = []
        spent = {name: row[name] for name in SPENT if name in row}
        with self.metrics.unit(spent):
            reason = self.broken or self._reason(lambda: done.append(self._run(row)), row["id"])
        return ({"id": row["id"], "error": f"{self.name}: {reason}"} if reason else done[0]) | spent

    def _run(self, row: Row) -> Row:
        assert self.inner is not None
        if self.attempts is None:
            return self.inner(row)
        attempt = self.attempts.begin(row["id"], 1)
        out = self.inner(row)
        attempt.finish()
        return out

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
    """Everything in this process, one unit after the other: tests, debugging, Tune trials, reference bytes."""
    threads = torch.get_num_threads()
    try:
        ready = [Guarded(stage) for stage in stages]
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
    import ray.data

    if not rows:
        return
    # from_items, because Parquet sources collapse small files into one block and their readers
    # starve behind actors that hold the CPUs.
    data: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for stage, (low, high, cpus, gpus) in zip(stages, fit_pools(stages, len(rows)), strict=True):
        data = data.map(
            _named(stage.name),  # type: ignore[arg-type]
            fn_constructor_args=(stage,),
            compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high),
            num_cpus=cpus,
            num_gpus=gpus,
        )
    try:
        yield from data.iter_rows()
    except Exception as error:
        names = ", ".join(stage.name for stage in stages)
        reason = str(error).strip().splitlines()
        raise RunError(
            f"{names}: Ray gave up ({reason[-1] if reason else type(error).__name__}); what is finished is kept, "
            "run the same command again to resume"
        ) from error


def _named(name: str) -> type[Guarded]:
    """``Guarded`` under the stage's name, which is what Ray's dashboard and messages show."""
    return type("".join(w.title() for w in name.replace("-", " ").split()), (Guarded,), {})


def fit_pools(stages: list[ActorStage], num_rows: int) -> list[tuple[int, int, float, float]]:
    """(min actors, max actors, CPUs, GPUs of one actor) per stage on the running cluster.

    CPU actors ask for a fraction, such that all pools together leave part of a CPU to Ray's own tasks: a reader
    must always find one, or the pipeline stands still.

    Raises:
        UserError: the smallest pools do not fit the cluster.
    """
    total_cpus, total_gpus = cluster_totals()
    out = []
    for stage in stages:
        wanted = stage.resources
        # All pools of a chain work at the same time, so by default they share the devices, in shares that pack.
        shared = 1 / math.ceil(len(stages) / total_gpus) if total_gpus else 0.0
        gpus = wanted.gpus if wanted.gpus is not None else shared
        room = int(total_gpus / gpus) if gpus else int(total_cpus // wanted.threads)
        low, high = wanted.pool or (1, max(1, room))
        # One actor per row is the most that can work at once.
        low, high = min(low, num_rows), min(high, num_rows)
        # GPU actors wait on the device; a CPU share would only bar them from nodes with few CPUs.
        share = 0.0 if gpus else round(0.9 * total_cpus / (high * len(stages)), 3)
        cpus = wanted.cpus if wanted.cpus is not None else min(float(wanted.threads), share)
        out.append((low, high, cpus, gpus))
    for kind, total, asked in (
        ("CPUs", total_cpus, sum(low * cpus for low, _, cpus, _ in out)),
        ("GPUs", total_gpus, sum(low * gpus for low, _, _, gpus in out)),
    ):
        # Ray would wait for them for hours without a word.
        if asked > total + 1e-6:
            raise UserError(
                f"resources: {', '.join(stage.name for stage in stages)} ask for {asked:g} {kind} at least, but Ray "
                f"has {total:g}; lower their cpus, gpus or actors"
            )
    return out


def failures(rows: Iterable[Row]) -> list[Row]:
    """The rows that carry an error."""
    return [row for row in rows if row["error"]]
