"""The run directory: who owns it, what it was made from, how long it took."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster import storage
from cluster.errors import UserError, some
from cluster.version import __version__
from pipeline.config import Config
from pipeline.loading import dump_yaml, parse_yaml, resolve

RUN_FILE = "run.yaml"
TIMING = "progress/seconds.json"
PACKAGES = ["ray", "torch", "torchvision", "timm", "numpy", "pyarrow", "pillow"]


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    return {
        "prism": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def read_run(out: str) -> Config:
    """The configuration of a run directory.

    Raises:
        UserError: ``out`` holds no run.
    """
    where = storage.join(out, RUN_FILE)
    if not storage.exists(where):
        raise UserError(f"{out}: no run there ({RUN_FILE} is missing); `prism run CONFIG` makes one")
    return resolve(parse_yaml(storage.read_bytes(where), where))


def check_owner(config: Config, fingerprints: dict[str, str]) -> None:
    """Refuse a run directory that was made by another configuration or from other data.

    Args:
        config: of the run about to start.
        fingerprints: of the data, ``train`` and ``val``.

    Raises:
        UserError: names the fields that differ.
    """
    where = storage.join(config.out, RUN_FILE)
    if not storage.exists(where):
        # Shards without their run.yaml are of unknown origin; mixing with them would be worse than stopping.
        if storage.list_files(storage.join(config.out, "recovered")):
            raise UserError(
                f"out: {config.out} holds images but no {RUN_FILE}; choose another out or delete that folder"
            )
        return
    found = read_run(config.out)
    changed = differences(found.identity(), config.identity())
    known = found.provenance.get("data_fingerprints", {})
    for split, fingerprint in fingerprints.items():
        if known.get(split, fingerprint) != fingerprint:
            changed.append(f"data.{split} (other images than the run was made from)")
    if changed:
        raise UserError(
            f"out: {config.out} holds a run of another configuration; it differs in {some(changed)}; choose another out"
        )


def claim(config: Config, fingerprints: dict[str, str]) -> None:
    """Write ``run.yaml``: the resolved configuration, runnable, with versions and data fingerprints."""
    provenance = {"versions": versions(), "data_fingerprints": fingerprints, "config_sha256": config.sha256()}
    text = dump_yaml(config.model_copy(update={"provenance": provenance}))
    storage.write_bytes(storage.join(config.out, RUN_FILE), text.encode())


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Paths at which two nested mappings differ, with both values where these are short."""
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in sorted(old.keys() | new.keys()):
            out += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return out
    return [] if old == new else [f"{path} (there: {old}, here: {new})" if len(f"{old}{new}") < 60 else path]


@contextmanager
def timed(out: str, stage: str) -> Iterator[None]:
    """Add the body's seconds to the stage's; interrupted and resumed parts add up."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds = read_seconds(out)
        seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - start, 2)
        storage.write_json(storage.join(out, TIMING), seconds)


def read_seconds(out: str) -> dict[str, float]:
    """Seconds per stage so far."""
    where = storage.join(out, TIMING)
    return dict(storage.read_json(where)) if storage.exists(where) else {}
