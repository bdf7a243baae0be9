"""``prism bench``: how fast this machine makes a configuration's recovery steps, and how near to its limits that is."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from cluster.facts import versions
from cluster.progress import console
from pipeline.config import Config
from pipeline.describe import class_count, cost, human
from pipeline.plan import REFERENCE_STEP_FLOPS, REFERENCE_STEP_S, make_plan, passes_per_step
from pipeline.preflight import check_networks
from stages.data import DataSpec
from stages.device import pick_device
from stages.recover.occupancy import Sharing, compare, fastest, sharings
from stages.recover.speed import Way, copy_rate, in_turns, matmul_rate, processor, thread_count, timed
from stages.recover.timing import TimedStep, steps_of_turn
from stages.recover.unit import RecoverUnit

# Of every BatchNorm input z = conv(a'), with a what becomes of it, in separate convolutions and one pass between two of
# them: z is written, read, a written, read; backward ∂a written, read, z read, ∂z written, read.
PASSES = 9


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        device: name of the processor.
        threads: of torch, 0 on a GPU.
        teachers: of the measured step.
        images, image_size: of its unit.
        precision, compiled: of recovery.
        first_s: seconds until the first step was made.
        image_steps: images times steps a second.
        published: the same of the published way of the step, for as much arithmetic of the teachers.
        flops: floating-point operations a second (teachers' multiplications and additions).
        flops_limit: of a matrix product in the step's precision.
        traffic: bytes a second, counted as ``PASSES`` over every BatchNorm input.
        traffic_limit: of a copy, read and written.
        recover_hours: of the whole plan on one such machine.
        relabel_hours: the same, if forward passes get as many operations a second.
        together: image-steps a second of several workers at the same time, with ``--probe``; None where they do not fit
            into the memory.
        settings: that make a run do as the fastest of these.
        versions: of the libraries.
    """

    device: str
    threads: int
    teachers: list[str]
    images: int
    image_size: int
    precision: str
    compiled: bool
    first_s: float
    image_steps: float
    published: float
    flops: float
    flops_limit: float
    traffic: float
    traffic_limit: float
    recover_hours: float
    relabel_hours: float
    together: list[dict[str, float | None]]
    settings: list[str]
    versions: dict[str, str]

    @property
    def limit(self) -> float:
        """Share of the speed that the machine's nearer limit would allow."""
        return max(self.flops / self.flops_limit, self.traffic / self.traffic_limit)


def bench(config: Config, rounds: int, price: float | None, *, probing: bool, as_json: bool) -> None:
    """Measure and print.

    Args:
        config: needs no data and no weights where ``data.num_classes`` is given. What a teacher takes from its weights'
            card or configuration (``input_size`` above all) has to be written out to be measured.
        rounds: of turns between the published way and ours; medians count.
        price: of an hour of this machine.
        probing: also find out how many units at the same time are fastest.
        as_json: for programs.

    Raises:
        UserError: an architecture does not fit.
    """
    found = measure(config, rounds, probing)
    if as_json:
        shown = {**asdict(found), "ratio": found.image_steps / found.published, "limit": found.limit}
        print(json.dumps(shown | ({} if price is None else {"recover_cost": found.recover_hours * price})))
        return
    ratio = found.image_steps / found.published
    kind = f"{found.precision}{', compiled' if found.compiled else ''}"
    threads = f", {found.threads} threads" if found.threads else ""
    lines = {
        "step": f"{found.images} images of {found.image_size} px, {', '.join(found.teachers)}; {kind}",
        "machine": f"{found.device}{threads}",
        "speed": f"{found.image_steps:.4g} image-steps/s, a step in {found.images / found.image_steps:.3g} s",
        "published way": f"{found.published:.4g} image-steps/s, this is {ratio:.2f} times it",
        "first step": f"after {found.first_s:.3g} s",
        "arithmetic": f"{found.flops / 1e9:,.0f} of {found.flops_limit / 1e9:,.0f} GFLOP/s of a matrix product",
        "memory": f"{human(found.traffic)}/s of {human(found.traffic_limit)}/s of a copy",
        "limit": f"{100 * found.limit:.0f} % of what the nearer of the two allows",
        "whole plan": f"about {found.recover_hours:.3g} h recover, {found.relabel_hours:.3g} h relabel on such a one",
    }
    for each in found.together:
        name = f"{each['workers']} x {each['threads']} thread{'s' if each['threads'] != 1 else ''}"
        rate = each["image_steps"]
        lines[name] = "does not fit into the memory" if rate is None else f"{rate:.4g} image-steps/s in all workers"
    if found.settings:
        lines["fastest with"] = " ".join(found.settings)
    if price is not None:
        lines["cost"] = f"{found.recover_hours * price:.2f} for recover, {found.relabel_hours * price:.2f} for relabel"
    for name, text in lines.items():
        console.print(f"{name:<14} {text}", soft_wrap=True, markup=False, highlight=False)


def measure(config: Config, rounds: int, probing: bool) -> Speed:
    """See ``bench``."""
    classes = class_count(config)
    networks = check_networks(config, classes)
    units = make_plan(config, classes)
    device = pick_device(config.resources.recover.gpus != 0)
    precision = config.recover.precision

    def work(unit: RecoverUnit) -> float:
        """Floating-point operations of a step for one image, expected."""
        return 2 * sum(share * networks[name].flops for name, share in passes_per_step(unit, config).items())

    # The unit nearest to the mean.
    mean = statistics.fmean(work(unit) for unit in units)
    unit = min(units, key=lambda unit: (abs(work(unit) - mean), -len(unit.classes), unit.ipc))
    data = _data(config, classes)
    step = TimedStep(unit, config.teachers, data, config.recover, device)
    first = timed(lambda: step.ours(1))
    ours, published = step.turn(), steps_of_turn(timed(lambda: step.published(1)))
    ways = {
        "ours": Way(lambda: step.ours(ours), step.warm),
        "published": Way(lambda: step.published(published), lambda: step.set_memory(False)),
    }
    seconds = {name: statistics.median(values) for name, values in in_turns(ways, rounds).items()}
    images = len(unit.classes)

    def arithmetic(sets: Sequence[Iterable[str]]) -> float:
        """Mean floating-point operations of steps with such sets for one image."""
        return statistics.fmean(2 * sum(networks[name].flops for name in names) for names in sets)

    sets = [step.used(index) for index in range(ours)]
    rate = images * ours / seconds["ours"]
    flops = rate * arithmetic(sets)
    published_flops = images * published / seconds["published"] * arithmetic([step.used(0)])
    elements = statistics.fmean(sum(networks[name].bn_elements for name in names) for names in sets)
    wide = 2 if precision == "bf16" else 4
    planned = cost(config, units, networks, classes)
    scale = REFERENCE_STEP_FLOPS / REFERENCE_STEP_S / flops
    limits = matmul_rate(device, precision), copy_rate(device)
    tried: dict[Sharing, float | None] = {}
    if probing:
        # Its memory is the workers' now.
        del step, ways
        cpus = config.resources.session.num_cpus or thread_count(device)
        tried = compare(unit, config.teachers, data, config.recover, device, sharings(device, cpus), ours)
    best = fastest(tried)
    return Speed(
        device=processor(device),
        threads=thread_count(device),
        teachers=list(dict.fromkeys([*unit.logit_teachers, *unit.bn_teachers])),
        images=images,
        image_size=config.data.image_size,
        precision=precision,
        compiled=config.recover.compile,
        first_s=first,
        image_steps=rate,
        published=rate * published_flops / flops,
        flops=flops,
        flops_limit=limits[0],
        traffic=rate * PASSES * wide * elements,
        traffic_limit=limits[1],
        # A run that does as the fastest has as many workers.
        recover_hours=planned.recover_hours * scale * (rate / best[1] if best else 1),
        relabel_hours=planned.relabel_hours * scale,
        together=[{**asdict(sharing), "image_steps": value} for sharing, value in tried.items()],
        settings=_settings(best[0], device.type, config) if best else [],
        versions=versions(),
    )


def _settings(sharing: Sharing, kind: str, config: Config) -> list[str]:
    """Fields with which a run does so, on CPUs on one such machine; without a number of actors it has one per share."""
    share, actors = f"gpus={1 / sharing.workers:g}", "null"
    if kind != "cuda":
        share, actors = f"threads={sharing.threads}", str(sharing.workers)
    instead = ["resources.probe=false"] if config.resources.probe else []
    return [f"resources.recover.{share}", f"resources.recover.actors={actors}", *instead]


def _data(config: Config, classes: int) -> DataSpec:
    """The images' space, without images."""
    data, half = config.data, (0.5,) * config.data.channels
    names = tuple(f"class {index}" for index in range(classes))
    mean, std = tuple(data.mean or half), tuple(data.std or half)
    return DataSpec(data.image_size, data.channels, mean, std, names, data.resize)
