"""A whole run on tiny data: serial, with one and with two actors, killed and resumed; always the same bytes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from cluster.progress import read_progress
from pipeline.status import read_status


def shards_in(folder: Path) -> list[Path]:
    """Committed ones: not what a killed writer left under a temporary name."""
    return sorted(p for p in folder.glob("*.parquet") if not p.name.startswith("."))


def digests(folder: Path) -> dict[str, str]:
    assert folder.is_dir()
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in shards_in(folder)}


def images_and_labels(out: Path) -> dict[str, dict[str, str]]:
    return {name: digests(out / name) for name in ("recovered", "init", "labels/distilled", "labels/random_real")}


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory, tiny_data):
    """Trained teachers, shared by the runs below through the content-addressed cache."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(tiny_config, squeezed):
    def make(out: Path, **sections) -> Path:
        merged = {"out": str(out), "squeeze": {"cache": str(squeezed)}, **sections}
        path = tiny_config(**merged)
        own = path.with_name(f"{out.name}.yaml")
        own.write_bytes(path.read_bytes())
        return own

    return make


@pytest.fixture
def serial_run(prism, config, tmp_path):
    out = tmp_path / "serial"
    code, text, err = prism("run", config(out), "--serial")
    assert code == 0, err
    return out, text


def test_serial_run_makes_the_whole_contract(serial_run):
    out, text = serial_run
    assert "report.html" in text
    assert (out / "report.html").stat().st_size > 10_000
    assert len(pq.read_table(out / "plan.parquet")) == 2
    assert sorted(p.name for p in (out / "recovered").iterdir()) == [
        "unit-00000-00000.parquet",
        "unit-00001-00000.parquet",
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert [r["method"] for r in summary["results"]] == ["prism", "random_real", "hard_label"]
    assert summary["units"] == {"planned": 2, "done": 2, "retried": 0}
    assert set(summary["seconds"]) >= {"squeeze", "recover", "relabel", "evaluate"}
    assert set(summary["diversity"]) == {"feature_model", "distilled", "real"}
    assert len(summary["diversity"]["distilled"]["per_class"]) == 3
    assert summary["bytes"]["images"] > 0 < summary["bytes"]["labels"]
    run = yaml.safe_load((out / "run.yaml").read_text())
    assert run["provenance"]["versions"]["torch"]
    card = json.loads((out / "teachers" / "res" / "card.json").read_text())
    assert card["class_names"] == ["ant", "bee", "cat"]


def test_second_run_redoes_nothing_and_run_yaml_is_runnable(prism, serial_run):
    out, _ = serial_run
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet") if p.name != "plan.parquet"}
    code, _, err = prism("run", out / "run.yaml", "--serial")
    assert code == 0, err
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_student_taken_out_leaves_the_results(prism, config, serial_run):
    out, _ = serial_run
    code, text, err = prism("run", config(out, evaluate={"baselines": []}), "--serial")
    assert code == 0, err
    results = json.loads((out / "summary.json").read_text())["results"]
    assert [r["method"] for r in results] == ["prism"]
    assert "random_real" not in text


def test_students_of_random_real_images_take_turns_on_draws(prism, config, serial_run):
    """The first draw is the one that a run with a single draw has; what there was is kept."""
    out, _ = serial_run
    before = digests(out / "labels/random_real")
    evaluate = {"baselines": ["random_real"], "seeds": [0, 1, 2], "draws": 2}
    code, _, err = prism("run", config(out, evaluate=evaluate), "--serial")
    assert code == 0, err
    assert digests(out / "labels/random_real") == before
    assert sorted(p.name for p in (out / "baselines").iterdir()) == ["random_real", "random_real-1"]
    assert sorted(p.name for p in (out / "labels").iterdir()) == ["distilled", "random_real", "random_real-1"]
    assert digests(out / "labels/random_real-1") != before
    assert digests(out / "baselines/random_real-1") != digests(out / "baselines/random_real")
    results = json.loads((out / "summary.json").read_text())["results"]
    assert sorted(r["seed"] for r in results if r["method"] == "random_real") == [0, 1, 2]
    found = read_status(str(out))
    assert found.state == "finished"
    assert {s.name: s.done == s.planned for s in found.stages if s.name.startswith("baseline")} == {
        "baseline": True,
        "baseline 1": True,
    }
    # A student of another draw is another student.
    result = next((out / "eval").glob("random_real--*--s1.json"))
    of_draw_1 = result.stat().st_mtime_ns
    code, _, err = prism("run", config(out, evaluate=evaluate | {"draws": 1}), "--serial")
    assert code == 0, err
    assert result.stat().st_mtime_ns != of_draw_1


def test_a_retrained_teacher_redoes_what_came_from_it(prism, config, serial_run):
    out, _ = serial_run
    before = digests(out / "recovered")
    card = out / "teachers" / "res" / "card.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "sha256": "of other weights"}))
    code, _, err = prism("evaluate", out / "run.yaml", "--serial")
    assert code == 2
    assert "lacks 2 of 2 recovered units" in err
    code, _, err = prism("run", out / "run.yaml", "--serial")
    assert code == 0, err
    assert set(digests(out / "recovered").values()).isdisjoint(before.values())


def test_a_diverging_unit_ends_with_exit_1_and_says_how_to_go_on(prism, config, tmp_path):
    out = tmp_path / "nan"
    code, _, err = prism("run", config(out, recover={"r_bn": 1e300}), "--serial")
    assert code == 1
    assert "unit-00000-00000" in err
    assert "seed" in err
    assert "again to resume" in err
    assert "Traceback" not in err


def test_status_reads_the_directory_alone(prism, serial_run):
    code, text, _ = prism("status", serial_run[0])
    assert code == 0
    assert "2/2 units" in text
    assert "res, conv" in text


def test_foreign_and_half_written_shards_are_redone(prism, config, serial_run):
    out, _ = serial_run
    want = digests(out / "recovered")
    first, second = sorted((out / "recovered").iterdir())
    first.write_bytes(first.read_bytes()[:500])
    other = pq.read_table(second)
    pq.write_table(other.replace_schema_metadata({"prism": json.dumps({"unit": "someone's"})}), second)
    code, _, err = prism("recover", out / "run.yaml", "--serial")
    assert code == 0, err
    assert digests(out / "recovered") == want


@pytest.mark.ray
@pytest.mark.parametrize("actors", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ray_gives_the_serial_bytes(prism, config, serial_run, tmp_path, ray_local, actors):
    out = tmp_path / f"actors{actors}"
    path = config(out, resources={"recover": {"actors": actors}, "relabel": {"actors": actors}})
    for stage in ("squeeze", "recover", "relabel"):
        code, _, err = prism(stage, path)
        assert code == 0, err
    assert images_and_labels(out) == images_and_labels(serial_run[0])


@pytest.mark.ray
def test_a_later_stage_that_cannot_fit_is_refused_before_the_first(prism, config, tmp_path, ray_local):
    out = tmp_path / "out"
    code, _, err = prism("run", config(out, resources={"relabel": {"cpus": 2}}))
    assert code == 2
    assert "relabel-res, relabel-conv" in err
    assert "ask for 4" in err
    assert not (out / "teachers").exists()


def start(stage: str, path: Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", stage, str(path)],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        **options,
    )


def kill_when(process: subprocess.Popen, ready, timeout: float = 120) -> None:
    """SIGKILL a driver as soon as ``ready()`` holds."""
    end = time.monotonic() + timeout
    while not ready():
        assert process.poll() is None, f"ended before it could be killed: {process.communicate()[0]}"
        assert time.monotonic() < end, "nothing was committed in time"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_sigkill_of_the_driver_then_the_same_command(prism, config, tmp_path):
    sections = {
        "recover": {"ipc": 6, "chunk": 3, "iterations": 150},
        "relabel": {"epochs": 64, "batch": 6},
        "resources": {"recover": {"actors": 1}},
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for stage in ("squeeze", "recover", "relabel"):
        code, _, err = prism(stage, config(whole, **sections), "--serial")
        assert code == 0, err

    path = config(cut, **sections)
    code, _, err = prism("squeeze", path, "--serial")
    assert code == 0, err
    for stage, folder, total in (("recover", "recovered", 6), ("relabel", "labels/distilled", 16)):
        kill_when(start(stage, path), lambda folder=folder: len(shards_in(cut / folder)) >= 2)
        kept = {p: p.stat().st_mtime_ns for p in shards_in(cut / folder)}
        assert 2 <= len(kept) < total
        again = start(stage, path)
        text = again.communicate(timeout=300)[0]
        assert again.returncode == 0, text
        assert {p: p.stat().st_mtime_ns for p in kept} == kept, "a committed unit ran again"
        assert digests(cut / folder) == digests(whole / folder)
    assert images_and_labels(cut) == images_and_labels(whole)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", ["squeeze", "recover", "evaluate"])
def test_ctrl_c_is_one_sentence(config, tmp_path, prism, stage):
    """The whole group gets the signal, as from a terminal; also while Ray Train works."""
    long = {"squeeze": {"epochs": 5000}, "recover": {"iterations": 10**6}, "relabel": {"epochs": 2000, "batch": 6}}
    field = "relabel" if stage == "evaluate" else stage
    path = config(tmp_path / "out", **{field: long[field]})
    for before in {"squeeze": [], "recover": ["squeeze"], "evaluate": ["squeeze", "recover", "relabel"]}[stage]:
        code, _, err = prism(before, path, "--serial")
        assert code == 0, err
    # A shell that starts things in the background makes them ignore the signal, for all their children.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start(stage, path, start_new_session=True, preexec_fn=heed)
    progress = tmp_path / "out" / "progress" / ("train_students" if stage == "evaluate" else stage)
    try:
        while not any(record["done"] >= 1 for record in read_progress(str(progress)).values()):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        text = process.communicate(timeout=100)[0]
    finally:
        process.kill()
    assert process.returncode == 1, text
    assert text.splitlines()[-1] == "interrupted: what was finished is kept; run the same command again to resume"
    assert "Traceback" not in text
