"""``prism doctor``: what would keep a run from working here, found before it is started."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from cluster import storage
from cluster.capacity import read_capacity
from cluster.checks import CHECKS, Finding, check_gpus, check_versions
from cluster.errors import PrismError
from cluster.facts import Use, gather, versions
from cluster.progress import console
from cluster.resources import SessionOptions
from cluster.runner import run_ray
from cluster.session import ray_session
from pipeline import rundir
from pipeline.config import Config
from pipeline.context import Run
from pipeline.paths import absolute
from pipeline.preflight import Ready, check_data, check_networks, check_students
from pipeline.run import check_fit
from pipeline.steps import STAGES
from stages.teachers.options import PRETRAINED
from stages.teachers.teacher import load_teacher

COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(config: Config | None, session: SessionOptions) -> bool:
    """Check and print, a line for each finding.

    Args:
        config: of a run; None: machine and cluster alone.
        session: how to reach Ray.

    Returns:
        Whether no problem was found; warnings are none.
    """
    good = True
    for finding in diagnose(config and absolute(config), session):
        good = good and finding.level != "problem"
        console.print(f"{finding.level:<8}", style=COLOURS[finding.level], end=" ")
        remedy = f": {finding.remedy}" if finding.remedy else ""
        console.print(f"{finding.check:<14} {finding.text}{remedy}", soft_wrap=True, markup=False)
    return good


def diagnose(config: Config | None, session: SessionOptions) -> Iterator[Finding]:
    """Findings about configuration, data and weights, then about every node of the cluster."""
    run = (yield from _inputs(config)) if config else None
    try:
        with ray_session(session), _places(config, session) as places:
            facts, unreachable = gather(places)
            where = session.address or "a private session"
            yield Finding(level="ok", check="ray", text=f"{where}: {len(facts)} nodes answer")
            yield from unreachable
            yield from check_versions(versions(), facts)
            yield from check_gpus(facts, gpu_fields(config) if config else [], read_capacity().gpus)
            for check in CHECKS:
                yield from check(facts)
            if run:
                yield from _told("resources", lambda: check_fit(run, list(STAGES)), "every stage fits the cluster")
    except PrismError as error:
        yield Finding(level="problem", check="ray", text=str(error))


def _inputs(config: Config) -> Generator[Finding, None, Run | None]:
    """What can be known without Ray; returns the run when nothing is in its way."""
    yield from _told("out", lambda: storage.check_writable(config.out, "out"), f"{config.out} is writable")
    ready: list[Ready] = []

    def look() -> None:
        train, val, data = check_data(config)
        networks = check_networks(config, data.num_classes)
        ready.append(Ready(train, val, data, networks, check_students(config, data.num_classes)))

    yield from _told("data", look, "both splits are there and fit the configuration, and so do all networks")
    if not ready:
        return None
    data = ready[0].data
    for name, spec in config.teachers.items():
        if spec.weights is not None:
            load = functools.partial(load_teacher, name, spec, data)
            yield from _told("weights", load, f"teachers.{name}: {spec.weights} loads and fits")
    fingerprints = ready[0].fingerprints
    yield from _told("out", lambda: rundir.check_owner(config, fingerprints), "nothing there, or this run")
    return Run(config, ready[0], run_ray, False)


def _told(check: str, action: Callable[[], object], text: str) -> Iterator[Finding]:
    """One finding: ``text``, or the sentence with which ``action`` refused."""
    try:
        action()
    except PrismError as error:
        yield Finding(level="problem", check=check, text=str(error))
    except OSError as error:
        yield Finding(level="problem", check=check, text=f"{error.filename or check}: {error.strerror or error}")
    else:
        yield Finding(level="ok", check=check, text=text)


def gpu_fields(config: Config) -> list[str]:
    """Fields of the configuration that ask for a GPU."""
    resources = config.resources
    wanted = {
        "squeeze": resources.squeeze.gpus,
        "recover": resources.recover.gpus,
        "relabel": resources.relabel.gpus,
        "evaluate": resources.evaluate.gpus,
        "validate": resources.validate_.gpus,
    }
    return [f"resources.{name}.gpus" for name, gpus in wanted.items() if gpus]


@contextlib.contextmanager
def _places(config: Config | None, session: SessionOptions) -> Iterator[dict[str, tuple[Use, str]]]:
    """What every node must be able to use: field → (what for, URI)."""
    if config is None:
        yield {}
        return
    places: dict[str, tuple[Use, str]] = {"out": ("write", config.out)}
    for field, uri in (("data.train", config.data.train), ("data.val", config.data.val)):
        if uri:
            places[field] = "read", storage.join(uri, "dataset.json")
    for name, spec in config.teachers.items():
        if spec.weights and spec.weights != PRETRAINED:
            places[f"teachers.{name}.weights"] = "read", spec.weights
    if not storage.is_local(config.out) or session.address is None:
        yield places
        return
    # A folder of the same name may be there on every machine: only one that is shared has the driver's file in it.
    folder = Path(config.out)
    while not folder.is_dir():
        folder = folder.parent
    mark = folder / f".tmp-{uuid.uuid4().hex}"
    # Where this is not allowed the check of ``out`` says so.
    with contextlib.suppress(PermissionError):
        mark.touch()
        places["out, as one place for all nodes"] = "see", str(mark)
    try:
        yield places
    finally:
        mark.unlink(missing_ok=True)
