"""What a stage's workers ask for, and the arithmetic that says whether they fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.capacity import Capacity
from cluster.errors import UserError

# A worker process with its libraries, and a share of decoded images.
WORKER_BYTES = 2.5 * 2**30
# A worker with a GPU waits for it most of the time.
GPU_WORKER_CPUS = 0.5


class Frozen(BaseModel):
    """Base of every configuration section: unknown keys, NaN and infinity are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ActorResources(Frozen):
    """One actor pool.

    Attributes:
        cpus: CPUs one actor reserves. None: with a GPU none, else a fraction, so that all actors fit and leave room
            for Ray's own tasks.
        gpus: GPUs one actor reserves; a fraction lets several share a device. None: 1 where the cluster has GPUs or
            may get some, in shares where the pools of a stage are more than its GPUs; else 0.
        actors: how many, or [min, max]: fewer than min are refused where they can never fit; max are asked for while
            units wait, which makes an autoscaler add nodes. None: from 1 to one per GPU, or without GPUs one per CPU
            and 2.5 GiB of memory, of all nodes that the cluster has or may get; the pools of a stage share these.
        threads: torch threads of one actor. Part of what makes float sums come out the same, hence fixed.
    """

    cpus: float | None = Field(default=None, ge=0)
    gpus: float | None = Field(default=None, ge=0)
    actors: int | tuple[int, int] | None = None
    threads: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> ActorResources:
        low, high = self.pool or (1, 1)
        if low < 1 or high < low:
            raise ValueError("actors must be at least 1, and [min, max] with min ≤ max")
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus = {self.gpus:g} is neither a part of one GPU nor whole ones; write {self.gpus:.0f}")
        return self

    @property
    def pool(self) -> tuple[int, int] | None:
        """(min, max) actors, None where left to the cluster's size."""
        return (self.actors, self.actors) if isinstance(self.actors, int) else self.actors


class TrainResources(Frozen):
    """Ray Train worker groups, each of which trains one network at a time.

    Attributes:
        workers: data-parallel workers of one training.
        parallel: trainings at the same time. None: as many as there are GPUs for, without a whole GPU each as there
            are CPUs and memory for, and no more than networks to train.
        cpus: CPUs one worker reserves. None: with a GPU 0.5, else about as many as it has threads.
        gpus: GPUs one worker reserves; a fraction lets several trainings share a device, which small networks leave
            idle for most of the time. None: 1 where the cluster has GPUs, else 0.
        threads: torch threads of one worker. None: as many as let all workers at the same time find CPUs on the
            cluster's nodes. Part of what makes float sums come out the same.
    """

    workers: int = Field(default=1, ge=1)
    parallel: int | None = Field(default=None, ge=1)
    cpus: float | None = Field(default=None, ge=0)
    gpus: float | None = Field(default=None, ge=0)
    threads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> TrainResources:
        if self.gpus not in (None, 0, 1) and (self.workers > 1 or self.gpus > 1):
            wanted = "1, for the workers of a training cannot share a device" if self.workers > 1 else "at most 1"
            raise ValueError(f"gpus = {self.gpus:g}, but it must be {wanted}")
        return self


class SessionOptions(Frozen):
    """How to reach Ray.

    Attributes:
        address: None starts a private session on this machine; else a running cluster: ``auto`` finds the one of this
            machine, on a head node or in a job, host:port names one. One that asks for a token gets that of
            ``RAY_AUTH_TOKEN`` or of the file ``RAY_AUTH_TOKEN_PATH``; ``RAY_AUTH_MODE=token`` takes
            ``~/.ray/auth_token`` too.
        num_cpus: logical CPUs of a private session. None: those of the machine.
        object_store_mb: object store of a private session. None: an eighth of the memory, at most 2 GiB, since
            images and weights do not pass through it.
        no_progress_timeout_s: recover, relabel or validation is ended when none of its units has finished or been
            handed out for so many seconds, which says that it hangs. Must exceed the longest unit and the longest
            wait for a node of an autoscaled cluster together. None: never.
    """

    address: str | None = None
    num_cpus: int | None = None
    object_store_mb: int | None = None
    no_progress_timeout_s: int | None = Field(default=12 * 3600, ge=1)


@dataclass(frozen=True)
class Settled:
    """What trainings will have.

    Attributes:
        groups: at the same time.
        workers: of one group.
        threads: torch threads of one worker.
        cpus: that one worker reserves.
        gpus: that one worker reserves, at most 1.
    """

    groups: int
    workers: int
    threads: int
    cpus: float
    gpus: float


class Pool(NamedTuple):
    """Actors of one stage.

    Attributes:
        low: so many must fit.
        high: so many are asked for.
        cpus, gpus: of one actor.
    """

    low: int
    high: int
    cpus: float
    gpus: float


def fit_actors(wanted: Sequence[tuple[str, ActorResources]], rows: int, capacity: Capacity) -> list[Pool]:
    """Pools of a chain of stages that work at the same time.

    CPU actors ask for a fraction, such that all pools together leave part of a CPU to Ray's own tasks: a reader
    must always find one, or the pipeline stands still.

    Args:
        wanted: name and resources of every stage.
        rows: that will pass; one actor per row is the most that can work at once.
        capacity: of the cluster.

    Raises:
        UserError: the smallest pools do not fit, or an actor no node.
    """
    sharing = sum(resources.gpus is None for _, resources in wanted)
    # The whole chain runs on the first node that comes, so it does not wait for others, which may not come.
    share = 1 / math.ceil(sharing / capacity.gpus_to_start_with) if sharing and capacity.gpus else 0.0
    free = sum(resources.actors is None for _, resources in wanted)
    pools = [_pool(resources, share, len(wanted), free, rows, capacity) for _, resources in wanted]
    names = ", ".join(name for name, _ in wanted)
    for kind, total, asked in (
        ("CPUs", capacity.cpus, sum(pool.low * pool.cpus for pool in pools)),
        ("GPUs", capacity.gpus, sum(pool.low * pool.gpus for pool in pools)),
    ):
        # Ray would wait for them for hours without a word.
        if asked > total + 1e-6:
            raise UserError(
                f"resources: {names} ask for {asked:g} {kind} at least, but Ray {_has(capacity)} {total:g}; "
                "lower their cpus, gpus or actors"
            )
    for (name, _), pool in zip(wanted, pools, strict=True):
        if not capacity.room(pool.cpus, pool.gpus):
            raise UserError(
                f"resources: an actor of {name} asks for {pool.cpus:g} CPUs and {pool.gpus:g} GPUs, but Ray "
                f"{_has(capacity)} no node with as many; lower its cpus or gpus"
            )
    return _share_out(pools, capacity) if len(pools) > 1 else pools


def _pool(wanted: ActorResources, share: float, stages: int, free: int, rows: int, capacity: Capacity) -> Pool:
    """One of a chain of ``stages``, ``free`` of which are left to the room; ``share``: GPUs where none are said."""
    gpus = share if wanted.gpus is None else wanted.gpus
    if gpus:
        room = capacity.room(wanted.cpus or 0.0, gpus)
    else:
        # One process per CPU in all, and no more than memory holds.
        room = min(capacity.room(wanted.cpus or 0.0, 0.0), capacity.room(wanted.threads, 0.0))
        room = int(min(room, capacity.memory / WORKER_BYTES)) // max(1, free)
    low, high = (min(count, rows) for count in wanted.pool or (1, max(1, room)))
    if wanted.cpus is not None:
        return Pool(low, high, wanted.cpus, gpus)
    # GPU actors wait on the device; a CPU share would only bar them from nodes with few CPUs.
    if gpus:
        return Pool(low, high, 0.0, gpus)
    node = max((node.cpus for node in capacity.nodes), default=0.0)
    cpus = min(float(wanted.threads), round(0.9 * min(capacity.cpus / high, node) / stages, 3))
    # Where there are no CPUs at all, one is asked for in vain, and said so.
    return Pool(low, high, cpus or 1.0, gpus)


def _share_out(pools: list[Pool], capacity: Capacity) -> list[Pool]:
    """Let pools grow in turn while all fit: a stage that took what the next one needs would wait for it for ever."""
    counts = [pool.low for pool in pools]
    left = [
        capacity.cpus - sum(pool.low * pool.cpus for pool in pools),
        capacity.gpus - sum(pool.low * pool.gpus for pool in pools),
    ]
    grown = True
    while grown:
        grown = False
        for index, pool in enumerate(pools):
            if counts[index] < pool.high and pool.cpus <= left[0] + 1e-6 and pool.gpus <= left[1] + 1e-6:
                counts[index] += 1
                left = [left[0] - pool.cpus, left[1] - pool.gpus]
                grown = True
    return [pool._replace(high=count) for pool, count in zip(pools, counts, strict=True)]


def _has(capacity: Capacity) -> str:
    return "can get" if capacity.growth.types else "has"


def fit_groups(resources: TrainResources, jobs: int, field: str, capacity: Capacity) -> Settled:
    """What the configuration leaves open, from the cluster at its full size.

    Args:
        resources: asked for.
        jobs: more groups than jobs are of no use.
        field: names ``resources`` in errors.
        capacity: of the cluster.

    Raises:
        UserError: not even one group fits.
    """
    workers = resources.workers
    gpus = resources.gpus if resources.gpus is not None else float(capacity.gpus > 0)
    least = resources.cpus if resources.cpus is not None else GPU_WORKER_CPUS
    for kind, total, asked in (
        ("CPUs", capacity.cpus, workers * least),
        ("GPUs", capacity.gpus, workers * gpus),
    ):
        # Ray would wait for them without end.
        if asked > total + 1e-6:
            raise UserError(
                f"{field}: a training asks for {asked:g} {kind}, but Ray {_has(capacity)} {total:g}; "
                "lower workers, cpus or gpus"
            )
    room = capacity.room(least, gpus)
    if room < workers:
        raise UserError(
            f"{field}: {workers} workers ask for {least:g} CPUs and {gpus:g} GPUs each, but the nodes that "
            f"Ray {_has(capacity)} hold {room} such; lower workers or cpus"
        )
    if not gpus:
        room = int(capacity.cpus / max(least, resources.threads or 1))
    groups = max(1, min(resources.parallel or room // workers, jobs))
    # Before memory is looked at, which differs from one start to the next where threads, and so results, may not.
    largest = max(node.cpus for node in capacity.nodes)
    every = groups * workers
    together = (count for count in range(int(largest), 1, -1) if capacity.room(count, gpus) >= every)
    threads = resources.threads or next(together, 1)
    share = min(capacity.cpus / every, largest)
    # Of those with a GPU each, the machine has been made for as many.
    if gpus < 1 and resources.parallel is None:
        groups = max(1, min(groups, int(min(capacity.memory / (WORKER_BYTES * workers), groups))))
    # Without GPUs the CPUs are what is computed with: reserving them keeps groups on nodes that have them free.
    reserved = GPU_WORKER_CPUS if gpus else 0.9 * min(threads, share)
    reserved = resources.cpus if resources.cpus is not None else reserved
    return Settled(groups, workers, threads, reserved, gpus)
