"""``prism search`` as a user calls it, on tiny data: what it writes, goes on from, and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from cluster import storage
from cluster.shards import load_dataset
from pipeline.search.table import read_trials

SEARCH: dict[str, Any] = {
    "trials": 4,
    "space": {"recover.r_bn": {"log": [0.1, 100]}, "recover.bn_teachers": {"subset": "all"}},
    "rungs": [{"recover.iterations": 2}, {}],
    "reduction_factor": 2,
    "split": {"per_class": 6},
    "parallel": 2,
    "cpus": 0.5,
    "final_seeds": [0, 1],
}
# What depends on the machine, or on who came first.
PASSING = ("seconds", "units_shared")


def table(out: Path) -> list[dict[str, Any]]:
    """The trials, without what may differ from one start to the next."""
    rows = [trial.model_dump() for trial in read_trials(str(out / "search" / "trials.parquet"))]
    for row in rows:
        row["rungs"] = [{k: v for k, v in rung.items() if k not in PASSING} for rung in row["rungs"]]
    return rows


def measured(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (out / "search" / "measured").iterdir()}


def test_a_search_ends_with_a_configuration_that_gives_the_winners_figures(prism, tiny_config, tmp_path) -> None:
    out = tmp_path / "out"
    config = tiny_config(out=str(out), search=SEARCH, evaluate={"baselines": []})
    code, text, err = prism("search", config, "--serial")
    assert code == 0, err
    assert "best.yaml" in text
    assert "report.html" in text

    rows = table(out)
    assert [row["number"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["point"] == {"recover.r_bn": 10.0, "recover.bn_teachers": ["res", "conv"]}
    assert all(row["point"]["recover.bn_teachers"] for row in rows)
    assert {row["state"] for row in rows} <= {"finished", "stopped"}
    assert pq.read_table(out / "search" / "trials.parquet").num_rows == 4
    # Teachers of the search have not seen the images on which it measures.
    assert len(load_dataset(str(out / "search" / "data" / "val")).class_names) == 3
    base = yaml.safe_load((out / "search" / "base" / "run.yaml").read_text())
    assert base["data"]["train"].endswith("search/data/train")

    best = out / "search" / "best.yaml"
    settings = yaml.safe_load(best.read_text())
    final = json.loads((out / "search" / "final.json").read_text())
    winner = rows[final["winner"]["number"]]
    assert winner["state"] == "finished"
    assert winner["rungs"][-1]["top1"] == max(r["rungs"][-1]["top1"] for r in rows if r["state"] == "finished")
    assert {f"recover.{name}": settings["recover"][name] for name in ("r_bn", "bn_teachers")} == winner["point"]
    # The trials did not see the test data, the full runs did.
    assert settings["data"] == yaml.safe_load((out / "search" / "search.yaml").read_text())["data"]
    again = tmp_path / "again"
    code, _, err = prism("run", best, f"out={again}", "--serial")
    assert code == 0, err
    results = storage.read_json(str(again / "summary.json"))["results"]
    assert [r["top1_last"] for r in results] == final["winner"]["top1"]["res"]
    assert len(final["default"]["top1"]["res"]) == 2

    # The same command finds everything done.
    before = measured(out)
    code, _, err = prism("search", config, "--serial")
    assert code == 0, err
    assert measured(out) == before
    assert table(out) == rows
    # So does one that differs in what no trial depends on.
    code, _, err = prism("search", config, "recover.checkpoint_every=3", "evaluate.seeds=[7]", "--serial")
    assert code == 0, err
    assert measured(out) == before
    assert table(out) == rows

    report = out / "search" / "report.html"
    report.unlink()
    code, text, err = prism("report", out)
    assert code == 0, err
    assert str(report) in text
    assert report.exists()

    code, _, err = prism("search", config, "search.space.recover.r_bn={log: [1, 100]}", "--serial")
    assert code == 2
    assert "holds another search; it differs in search.space.recover.r_bn.log" in err
    assert measured(out) == before


def test_trials_that_fail_are_recorded_and_too_many_end_the_search(prism, tiny_config, tmp_path) -> None:
    """A weight at which every unit diverges is one of two choices."""
    space = {"recover.r_bn": {"choice": [10.0, 1e300]}, "recover.lr": {"log": [0.01, 1]}}
    changes = {**SEARCH, "space": space, "trials": 5, "sampler": "random", "min_succeeded": 0.2}
    config = tiny_config(out=str(tmp_path / "out"), search=changes, evaluate={"baselines": []})
    code, _, err = prism("search", config, "--serial")
    assert code == 0, err
    rows = table(tmp_path / "out")
    failed = [row for row in rows if row["state"] == "failed"]
    assert 0 < len(failed) < len(rows)
    for row in rows:
        assert (row["state"] == "failed") == (row["point"]["recover.r_bn"] == 1e300)
    assert all("unit-00000-00000" in row["reason"] for row in failed)
    assert "failed" in (tmp_path / "out" / "search" / "report.html").read_text()

    code, _, err = prism("search", config, "search.min_succeeded=1.0", "--serial")
    assert code == 1
    assert f"search: {len(failed)} of 5 trials failed, more than search.min_succeeded allows; trial" in err


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_table_of_the_serial_search(prism, ray_local, tiny_config, tmp_path) -> None:
    tables = []
    for name, words in (("ray", []), ("serial", ["--serial"])):
        out = tmp_path / name
        config = tiny_config(out=str(out), search={**SEARCH, "trials": 8}, evaluate={"baselines": []})
        code, _, err = prism("search", config, *words)
        assert code == 0, err
        tables.append((table(out), json.loads((out / "search" / "final.json").read_text())))
    (ray_table, ray_final), (serial_table, serial_final) = tables
    assert ray_table == serial_table
    assert ray_final["winner"]["top1"] == serial_final["winner"]["top1"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_full_cluster_gives_the_table_of_the_serial_search(prism, start_machines, tiny_config, tmp_path) -> None:
    """Jobs hold all that there is: one that asked for more than was reserved for it would wait for ever."""
    out = tmp_path / "out"
    settings = {**SEARCH, "trials": 8, "parallel": 4, "cpus": 1}
    config = tiny_config(out=str(out), search=settings, evaluate={"baselines": []})
    code, _, err = prism("search", config, "--serial")
    assert code == 0, err
    serial, jobs = table(out), measured(out).keys()
    # Split, teachers and full runs stay.
    for name in ("measured", "units"):
        shutil.rmtree(out / "search" / name)
    (out / "search" / "trials.parquet").unlink()

    address, _ = start_machines((1, 0), (1, 0), (1, 0))
    command = [sys.executable, "-m", "pipeline", "search", str(config), f"resources.session.address={address}"]
    subprocess.run(command, check=True, timeout=240)
    assert measured(out).keys() == jobs
    assert table(out) == serial


def test_a_search_needs_its_section(prism, tiny_config) -> None:
    code, _, err = prism("search", tiny_config())
    assert code == 2
    assert "error: search: is not given; say what to vary, e.g. search: {space:" in err


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(prism, tiny_config, tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None)
    config = tiny_config(out=str(tmp_path / "out"), search={**SEARCH, "trackers": [name]})
    code, _, err = prism("search", config, "--dry-run")
    assert code == 2
    assert f"error: search.trackers: {name} is not installed; `pip install {name}`, or take it out" in err


def test_dry_run_shows_the_space_and_the_rungs(prism, tiny_config, tmp_path) -> None:
    code, text, err = prism("search", tiny_config(out=str(tmp_path / "out"), search=SEARCH), "--dry-run")
    assert code == 0, err
    assert "recover.r_bn: log" in text
    assert "rung 2: as configured" in text
    assert not (tmp_path / "out").exists()


def test_a_search_climbs_from_few_classes_to_all(prism, tiny_config, tmp_path) -> None:
    out = tmp_path / "out"
    rungs = [{"classes": 2, "recover.iterations": 2}, {"recover.iterations": 2}]
    changes = {**SEARCH, "rungs": rungs, "trials": 3, "final_seeds": [0]}
    config = tiny_config(out=str(out), search=changes, evaluate={"baselines": []})
    code, text, err = prism("search", config, "--dry-run")
    assert code == 0, err
    assert "rung 1: classes = 2, recover.iterations = 2; the default takes" in text
    code, _, err = prism("search", config, "search.rungs=[{classes: 4}]", "--dry-run")
    assert code == 2
    assert "error: search.rungs.0.classes: 4 is given, but it must be a whole number from 2 to 3" in err
    assert not out.exists()

    code, _, err = prism("search", config, "--serial")
    assert code == 0, err
    rows = table(out)
    assert len(measured(out)) == sum(len(row["rungs"]) for row in rows) > 3
    for part, per_class in (("train", 24 - 6), ("val", 6)):
        few = load_dataset(str(out / "search" / "data" / "classes-2" / part))
        assert few.class_counts == [per_class] * 2
        assert set(few.class_names) < {"ant", "bee", "cat"}
    # Of the 12 images of two classes, so many are right.
    right = [row["rungs"][0]["top1"] / 100 * 12 for row in rows]
    assert right == pytest.approx([round(number) for number in right])
    assert load_dataset(yaml.safe_load((out / "search" / "best.yaml").read_text())["data"]["train"]).num_images == 72

    before = measured(out)
    code, _, err = prism("search", config, "--serial")
    assert code == 0, err
    assert measured(out) == before
    assert table(out) == rows


def test_images_for_the_largest_searched_ipc_must_be_there(prism, tiny_config, tmp_path) -> None:
    """24 of a class are there, 6 go to the split."""
    out = tmp_path / "out"
    space = {"recover.ipc": {"integer": [2, 18]}}
    config = tiny_config(out=str(out), search={**SEARCH, "space": space})
    assert prism("search", config, "--dry-run")[0] == 0
    code, _, err = prism("search", config, "search.space.recover.ipc.integer=[2, 19]", "--serial")
    assert code == 2
    assert "has 24 images, but 6 for the search split and 19 for recovery and baselines are needed" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("search.split.per_class=23", "search.split.per_class"),
        ("search.cpus=64", "search: a job asks for 64 CPUs"),
    ],
)
@pytest.mark.ray
def test_what_can_never_be_is_said_before_any_work(ray_local, prism, tiny_config, tmp_path, change, words) -> None:
    out = tmp_path / "out"
    code, _, err = prism("search", tiny_config(out=str(out), search=SEARCH), change)
    assert code == 2
    assert words in err
    assert not (out / "search" / "measured").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_sigkill_in_the_middle_then_the_same_command(tiny_config, tmp_path) -> None:
    """What was measured is kept, the table is that of an undisturbed search."""

    def command(out: Path) -> list[str]:
        config = tiny_config(search={**SEARCH, "trials": 8}, evaluate={"baselines": []})
        return [sys.executable, "-m", "pipeline", "search", str(config), f"out={out}"]

    whole = tmp_path / "whole"
    subprocess.run(command(whole), check=True, timeout=900)

    killed = tmp_path / "killed"
    process = subprocess.Popen(command(killed), start_new_session=True)
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if (killed / "search" / "measured").is_dir() and len(measured(killed)) >= 4:
            break
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # Its workers end once they miss it.
    time.sleep(5)
    kept = measured(killed)
    assert 4 <= len(kept) < len(measured(whole))
    subprocess.run(command(killed), check=True, timeout=900)
    after = measured(killed)
    assert {name: after[name] for name in kept} == kept
    assert table(killed) == table(whole)
    assert (killed / "search" / "final.json").exists()
