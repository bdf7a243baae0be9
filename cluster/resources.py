"""What a stage's workers ask for, and the arithmetic that says whether they fit."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
        cpus: CPUs one actor reserves. None: a fraction so that all actors of the pool leave room for a reader.
        gpus: GPUs one actor reserves; fractions share a device. None: 1 where the cluster has GPUs, else 0.
        actors: pool size, or [min, max] for a pool that grows and shrinks. None: one per GPU, else one per CPU.
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
        return self

    @property
    def pool(self) -> tuple[int, int] | None:
        """(min, max) actors, None where left to the cluster's size."""
        return (self.actors, self.actors) if isinstance(self.actors, int) else self.actors


class TrainResources(Frozen):
    """Ray Train worker groups, each of which trains one network at a time.

    Attributes:
        workers: data-parallel workers of one training.
        parallel: trainings at the same time. None: as many as there are GPUs for, without GPUs as there are CPUs
            and memory for, and no more than networks to train.
        cpus: CPUs one worker reserves. None: with a GPU 0.5, else about as many as it has threads.
        gpu: one GPU per worker. None: yes where the cluster has GPUs.
        threads: torch threads of one worker. None: all CPUs divided by all workers at the same time. Part of what
            makes float sums come out the same.
    """

    workers: int = Field(default=1, ge=1)
    parallel: int | None = Field(default=None, ge=1)
    cpus: float | None = Field(default=None, ge=0)
    gpu: bool | None = None
    threads: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Settled:
    """What trainings will have.

    Attributes:
        groups: at the same time.
        workers: of one group.
        threads: torch threads of one worker.
        cpus: that one worker reserves.
        gpu: whether each worker has one.
    """

    groups: int
    workers: int
    threads: int
    cpus: float
    gpu: bool


def fit_groups(
    resources: TrainResources, jobs: int, field: str, cpus: float, gpus: float, node_cpus: float, memory: float
) -> Settled:
    """What the configuration leaves open, from what the cluster has.

    Args:
        resources: asked for.
        jobs: more groups than jobs are of no use.
        field: names ``resources`` in errors.
        cpus: of the cluster.
        gpus: of the cluster.
        node_cpus: of its largest node.
        memory: of the cluster, bytes.

    Raises:
        UserError: not even one group fits.
    """
    workers = resources.workers
    gpu = resources.gpu if resources.gpu is not None else gpus > 0
    least = resources.cpus if resources.cpus is not None else GPU_WORKER_CPUS
    for kind, total, asked in (("CPUs", cpus, workers * least), ("GPUs", gpus, float(workers * gpu))):
        # Ray would wait for them without end.
        if asked > total + 1e-6:
            raise UserError(
                f"{field}: a training asks for {asked:g} {kind}, but Ray has {total:g}; lower workers, cpus or gpu"
            )
    if gpu:
        room = min(gpus, cpus / least if least else gpus)
    else:
        room = cpus / max(least, resources.threads or 1)
    groups = max(1, min(resources.parallel or int(room / workers), jobs))
    # Before memory is looked at, which differs from one start to the next where threads, and so results, may not.
    share = min(cpus / (groups * workers), node_cpus)
    threads = resources.threads or max(1, int(share))
    if not gpu and resources.parallel is None:
        groups = max(1, min(groups, int(memory / (WORKER_BYTES * workers))))
    # Without GPUs the CPUs are what is computed with: reserving them keeps groups on nodes that have them free.
    reserved = GPU_WORKER_CPUS if gpu else 0.9 * min(threads, share)
    reserved = resources.cpus if resources.cpus is not None else reserved
    return Settled(groups, workers, threads, reserved, gpu)
