"""Dependencies point one way: pipeline → stages → cluster, and cores know no Ray."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {"cluster": {"stages", "pipeline"}, "stages": {"pipeline"}, "pipeline": {"torch", "ray"}}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_depend_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        wrong = imports(path) & FORBIDDEN[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_cores_import_no_ray():
    cores = [*(ROOT / "stages").glob("*/core.py"), *(ROOT / "stages").glob("*.py")]
    assert len(cores) > 4
    for path in cores:
        assert "ray" not in imports(path), path
