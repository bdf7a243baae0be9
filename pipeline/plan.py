"""The work plan: a pure function of configuration and seed that says what will be optimised, by whom, how long."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from cluster import rng, storage
from cluster.classes import ClassIndex
from pipeline.config import Config
from stages.recover.selection import draw_subset
from stages.recover.unit import RecoverUnit

PLAN_FILE = "plan.parquet"


def steps_of(config: Config, ipc: int) -> int:
    """T_i = iterations − drop · (i mod modulo)."""
    stagger = config.recover.stagger
    return config.recover.iterations - stagger.drop * (ipc % stagger.modulo)


def teachers_of_index(config: Config, ipc: int) -> list[str]:
    """BN teachers of an IPC index: its own draw with ``per_index``, else the pool (methods: PRISM §2.4)."""
    recover = config.recover
    if recover.selection != "per_index":
        return list(recover.bn_teachers)
    return draw_subset(
        recover.bn_teachers,
        recover.logit_teachers[0],
        recover.include_prob,
        recover.max_bn_teachers,
        rng.generator(config.seed, "bn-subset", ipc),
    )


def make_plan(config: Config, num_classes: int) -> list[RecoverUnit]:
    """All units in (IPC index, class chunk) order, without the initial images, which need the data."""
    recover = config.recover
    units = []
    for ipc in range(recover.ipc):
        teachers = teachers_of_index(config, ipc)
        for chunk, start in enumerate(range(0, num_classes, recover.chunk)):
            units.append(
                RecoverUnit(
                    ipc=ipc,
                    chunk=chunk,
                    classes=list(range(start, min(start + recover.chunk, num_classes))),
                    logit_teachers=list(recover.logit_teachers),
                    bn_teachers=teachers,
                    iterations=steps_of(config, ipc),
                    seed=rng.derive_seed(config.seed, "unit", ipc, chunk),
                )
            )
    return units


def with_sources(units: Sequence[RecoverUnit], labels: Sequence[ArrayLike], num_classes: int) -> list[RecoverUnit]:
    """Units with their initial real images: the i-th of each class, in the data's order, for IPC index i.

    Args:
        units: of ``make_plan``.
        labels: of every shard, in row order.
        num_classes: of the data.
    """
    images = ClassIndex(labels, num_classes)
    return [u.model_copy(update={"sources": [images.locate(c, u.ipc) for c in u.classes]}) for u in units]


def save_plan(out: str, units: Sequence[RecoverUnit]) -> None:
    """Write ``plan.parquet``: one row per unit."""
    table = pa.Table.from_pylist(
        [{"unit": u.id, **u.model_dump(exclude={"sources"})} for u in units],
        schema=pa.schema(
            [
                ("unit", pa.string()),
                ("ipc", pa.int32()),
                ("chunk", pa.int32()),
                ("classes", pa.list_(pa.int32())),
                ("logit_teachers", pa.list_(pa.string())),
                ("bn_teachers", pa.list_(pa.string())),
                ("iterations", pa.int32()),
                ("seed", pa.int64()),
            ]
        ),
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.write_bytes(storage.join(out, PLAN_FILE), sink.getvalue())


def plan_size(out: str) -> int | None:
    """Units of a saved plan, None where there is none; reads its footer alone."""
    fs, path = storage.resolve(storage.join(out, PLAN_FILE))
    try:
        with fs.open(path, "rb") as file:
            return int(pq.read_metadata(file).num_rows)
    except FileNotFoundError:
        return None


# One step of ResNet-18 at 224 px on 100 images takes 52 ms on an RTX 4090 with the published fp32 code
# (29 h for 500 units of 4,000 steps); everything else is scaled from there by arithmetic work.
REFERENCE_STEP_S = 0.052
REFERENCE_STEP_FLOPS = 100 * 2 * 2 * 1.8141e9


@dataclass(frozen=True)
class Estimate:
    """What a plan costs.

    Attributes:
        units, images, steps: counts; steps are summed over units.
        recover_hours, relabel_hours: on one reference GPU (RTX 4090, fp32, the published speed).
        image_bytes, label_bytes: on disk.
    """

    units: int
    images: int
    steps: int
    recover_hours: float
    relabel_hours: float
    image_bytes: int
    label_bytes: int


def passes_per_step(unit: RecoverUnit, config: Config) -> dict[str, float]:
    """Expected forward passes of each network in one step; the primary serves both losses in one."""
    recover = config.recover
    pool = unit.bn_teachers
    if recover.selection == "round_robin":
        return {name: 1 / len(pool) for name in pool}
    chance = dict.fromkeys(pool, 1.0)
    if recover.selection == "per_step":
        primary = unit.logit_teachers[0]
        others = [n for n in pool if n != primary]
        slots = min(recover.max_bn_teachers, len(pool)) - 1
        mean = slots * recover.include_prob + (0 if primary in pool else 1)
        chance = {n: min(1.0, mean / len(others)) for n in others} if others else {}
    return {**chance, **dict.fromkeys(unit.logit_teachers, 1.0)}


def estimate(config: Config, units: Sequence[RecoverUnit], flops: dict[str, float], label_bytes: int) -> Estimate:
    """Cost of a plan.

    Args:
        config: of the run.
        units: of ``make_plan``.
        flops: teacher → floating-point operations of one forward pass of one image.
        label_bytes: of all label shards.
    """
    images = sum(len(u.classes) for u in units)
    rate = REFERENCE_STEP_FLOPS / REFERENCE_STEP_S
    # Frozen weights: the backward pass computes input gradients alone, about one more forward pass.
    recover = sum(
        u.iterations * len(u.classes) * 2 * sum(share * flops[n] for n, share in passes_per_step(u, config).items())
        for u in units
    )
    relabel = images * config.relabel.epochs * sum(flops[n] for n in config.relabel.teachers)
    data = config.data
    # Optimised pixels barely compress: PNG takes about 0.9 of the raw size.
    image_bytes = math.ceil(images * data.channels * data.image_size**2 * 0.9)
    return Estimate(
        units=len(units),
        images=images,
        steps=sum(u.iterations for u in units),
        recover_hours=recover / rate / 3600,
        relabel_hours=relabel / rate / 3600,
        image_bytes=image_bytes,
        label_bytes=label_bytes,
    )
