"""A small real dataset, and the command line called in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from chromium import Seen, find_browser, look_at
from image_tree import write_tree


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Three classes, 24 + 8 images of 16 px each, imported."""
    from cluster.runner import run_serial
    from stages.importing.detect import open_source
    from stages.importing.run import import_dataset

    root = tmp_path_factory.mktemp("tiny")
    write_tree(root / "tree", ["ant", "bee", "cat"], {"train": 24, "val": 8})
    import_dataset(open_source(str(root / "tree")), str(root / "data"), runner=run_serial)
    return root / "data"


@pytest.fixture
def tiny_config(tiny_data, tmp_path):
    """Writes a configuration of seconds for the tiny data; sections given as keywords are merged in."""

    def make(**sections) -> Path:
        from pipeline.loading import merge

        value = {
            "out": str(tmp_path / "run"),
            "data": {"train": str(tiny_data / "train"), "val": str(tiny_data / "val"), "image_size": 16},
            "teachers": {
                "res": {"arch": "builtin:resnet10", "kwargs": {"width": 4}},
                "conv": {"arch": "builtin:convnet_d3", "kwargs": {"width": 8}},
            },
            "squeeze": {"epochs": 1, "batch": 24, "lr": 0.05},
            "recover": {"ipc": 2, "chunk": 3, "iterations": 4},
            "relabel": {"epochs": 2, "batch": 6},
            "evaluate": {
                "students": {"res": {"arch": "builtin:resnet10", "kwargs": {"width": 4}}},
                "seeds": [0],
                "protocol": {"batch": 3, "val_every": 1},
            },
            "resources": {
                "session": {"num_cpus": 2, "object_store_mb": 200},
                "squeeze": {"threads": 1},
                "evaluate": {"threads": 1},
            },
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(merge(value, sections), sort_keys=False))
        return path

    return make


@pytest.fixture
def prism(monkeypatch, capsys):
    """Run ``prism ARGS`` in this process; returns (exit code, stdout, stderr)."""

    def call(*args: str) -> tuple[int, str, str]:
        from pipeline.cli import main

        monkeypatch.setattr(sys, "argv", ["prism", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        out = capsys.readouterr()
        return int(stop.value.code or 0), out.out, out.err

    return call


@pytest.fixture
def browser(tmp_path) -> Callable[..., Seen]:
    """``look_at`` in a headless Chromium; skipped where there is none."""
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on PATH")
    return lambda page, width=1280, **options: look_at(program, page, tmp_path / "browser", width, **options)
