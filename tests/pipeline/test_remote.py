"""Runs on a cluster that was there before: as jobs whose client goes away, and two at once."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from ray_head import ROOT, ray_head

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def digests(out: Path) -> dict[str, str]:
    files = [*out.glob("recovered/*.parquet"), *out.glob("labels/*/*.parquet")]
    assert files
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def measured(address: str) -> set[tuple[str, str, str]]:
    """(metric, stage, state) of what the agent of the node exports of us."""
    try:
        with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return set()
    found = set()
    for line in text.splitlines():
        if line.startswith("ray_prism_"):
            name, _, rest = line.partition("{")
            tags = dict(re.findall(r'(\w+)="([^"]*)"', rest))
            assert tags.get("job"), line
            found.add((name.removeprefix("ray_"), tags.get("stage", ""), tags.get("state", "")))
    return found


@pytest.fixture
def config(tiny_config, tmp_path):
    """Writes a configuration and makes its teachers and, beside it, its serial results."""

    def make(name: str, prism, **sections) -> tuple[Path, Path, dict[str, str]]:
        cache = tmp_path / "cache"
        for out in (name, f"{name}-serial"):
            path = tiny_config(out=str(tmp_path / out), squeeze={"cache": str(cache)}, **sections)
            own = tmp_path / out / "config" / "mine.yaml"
            own.parent.mkdir(parents=True)
            own.write_bytes(path.read_bytes())
        for stage in ("squeeze", "recover", "relabel"):
            code, _, err = prism(stage, own, "--serial")
            assert code == 0, err
        code, _, err = prism("squeeze", tmp_path / name / "config" / "mine.yaml", "--serial")
        assert code == 0, err
        return tmp_path / name / "config" / "mine.yaml", tmp_path / name, digests(tmp_path / f"{name}-serial")

    return make


def test_a_job_goes_on_when_its_client_has_gone(config, prism):
    path, out, expected = config("job", prism)
    with ray_head() as head:
        submit = [
            str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", head.dashboard, "--no-wait",
            "--submission-id", "prism-test", "--working-dir", str(path.parent), "--entrypoint-num-cpus", "0",
            "--", sys.executable, "-m", "pipeline", "run", "mine.yaml", "--address", "auto",
        ]  # fmt: skip
        # The head's agent comes up after its dashboard.
        for _ in range(20):
            done = subprocess.run(submit, env=head.env, capture_output=True, text=True, timeout=120, check=False)
            if "No available agent" not in done.stderr:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stdout + done.stderr

        def ask(what: str) -> str:
            command = [submit[0], "job", what, "--address", head.dashboard, "prism-test"]
            return subprocess.run(command, env=head.env, capture_output=True, text=True, check=True).stdout.lower()

        seen, metrics = set(), set()
        while True:
            metrics |= measured(head.metrics)
            code, text, _ = prism("status", out, "--json")
            if code == 0:
                status = json.loads(text)
                seen.add(status["state"])
                if status["state"] == "finished":
                    break
            assert "failed" not in ask("status"), ask("logs")
            time.sleep(2)
        assert "running" in seen
        while "succeeded" not in (state := ask("status")):
            assert "failed" not in state, ask("logs")
            time.sleep(1)
        logs = ask("logs")
    assert "report.html" in logs
    assert (out / "report.html").exists()
    assert digests(out) == expected
    # Prometheus reads the same numbers from the node's agent.
    wanted = {
        ("prism_units", "recover", "planned"),
        ("prism_units", "train_students", "done"),
        ("prism_images_total", "recover", ""),
        ("prism_loss", "recover", ""),
        ("prism_unit_seconds_count", "recover", ""),
        ("prism_units_running", "recover", ""),
    }
    assert wanted <= metrics, (wanted - metrics, metrics)
    assert not any(stage == "squeeze" for _, stage, _ in metrics)


def test_two_runs_at_once_give_the_bytes_of_each_alone(config, prism):
    sections = {"recover": {"ipc": 6, "chunk": 3, "iterations": 60}}
    runs = [config(name, prism, seed=seed, **sections) for name, seed in (("one", 1), ("two", 2))]
    assert runs[0][2] != runs[1][2]
    with ray_head() as head:
        for stage in ("recover", "relabel"):
            drivers = [
                subprocess.Popen(
                    [sys.executable, "-m", "pipeline", stage, str(path), "--address", head.address],
                    cwd=ROOT,
                    env=head.env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for path, _, _ in runs
            ]
            try:
                for driver in drivers:
                    text = driver.communicate(timeout=400)[0]
                    assert driver.returncode == 0, text
            finally:
                for driver in drivers:
                    driver.kill()
    for _, out, expected in runs:
        assert digests(out) == expected
