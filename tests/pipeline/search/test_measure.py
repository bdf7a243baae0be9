"""One job: what it measures is what a run measures, it goes on where it was, and units are shared by content."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import RunError
from pipeline.config import Config
from pipeline.loading import load_config
from pipeline.run import execute
from pipeline.search.measure import PREPARED, lighten, measure, reason_of

BOTH = "recover.bn_teachers=[res, conv]"


@pytest.fixture
def root(tiny_config, tmp_path) -> Path:
    """Of a search whose teachers are trained."""
    prepared = load_config(str(tiny_config(out=str(tmp_path / "search" / PREPARED))))
    execute(prepared, ["squeeze"], serial=True)
    return tmp_path / "search"


@pytest.fixture
def job(tiny_config):
    """Configuration of a job, with fields set."""

    def make(*overrides: str, seeds: tuple[int, ...] = (0,)) -> Config:
        words = ["recover.selection=fixed", *overrides]
        return lighten(load_config(str(tiny_config()), words), 1, list(seeds))

    return make


def files(root: Path) -> list[str]:
    return sorted(storage.list_files(str(root / "units")))


def test_a_job_measures_what_a_run_does(root, job, tiny_config, tmp_path) -> None:
    found = measure(str(root), job(seeds=(0, 1)), "00000-0")
    out = tmp_path / "run"
    shutil.copytree(root / PREPARED / "teachers", out / "teachers")
    words = ["recover.selection=fixed", "evaluate.seeds=[0, 1]", "evaluate.baselines=[]"]
    execute(load_config(str(tiny_config(out=str(out))), words), serial=True)
    top1 = [result["top1_last"] for result in storage.read_json(str(out / "summary.json"))["results"]]
    assert found.top1_seeds == top1
    assert found.top1 == pytest.approx(sum(top1) / 2)
    assert (found.units, found.units_shared) == (2, 0)
    # A job leaves its figures and its units, nothing else.
    assert not (root / "jobs" / "00000-0").exists()
    assert len(files(root)) == 2 * 2


def test_what_was_measured_is_not_measured_again(root, job) -> None:
    first = measure(str(root), job(), "00000-0")
    shutil.rmtree(root / "units")
    assert measure(str(root), job(), "00007-2") == first
    assert not (root / "units").exists()


def test_units_are_shared_by_what_determines_them(root, job) -> None:
    measure(str(root), job(BOTH), "00000-0")
    before = files(root)
    # Other labels, students and draws, the same units.
    assert measure(str(root), job(BOTH, "relabel.epochs=3"), "00001-0").units_shared == 2
    again = measure(str(root), job(BOTH, "recover.selection=per_index", "recover.include_prob=1.0"), "00002-0")
    assert again.units_shared == 2
    assert files(root) == before
    # One unit more, the same first two.
    assert measure(str(root), job(BOTH, "recover.ipc=3"), "00003-0").units_shared == 2
    for other in ("recover.r_bn=0.5", "recover.iterations=5", "recover.logit_teachers=[conv]", "recover.lr=0.01"):
        assert measure(str(root), job(BOTH, other), "00004-0").units_shared == 0, other
    # A draw at every step is not a set, though it may come to the same.
    assert measure(str(root), job(BOTH, "recover.selection=per_step"), "00005-0").units_shared == 0


def test_shared_units_give_the_same_figures(root, job) -> None:
    words = (BOTH, "recover.r_bn=0.3")
    alone = measure(str(root), job(*words), "00000-0")
    shutil.rmtree(root / "measured")
    shared = measure(str(root), job(*words), "00001-0")
    assert shared.units_shared == 2
    assert shared.top1_seeds == alone.top1_seeds


def test_an_interrupted_job_goes_on(root, job, monkeypatch) -> None:
    """Killed after recovery: its units are not made again."""
    from pipeline import steps

    def killed(run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps, "relabel", killed)
        with pytest.raises(KeyboardInterrupt):
            measure(str(root), job(), "00000-0")
    kept = {p: p.stat().st_mtime_ns for p in (root / "jobs" / "00000-0" / "recovered").iterdir()}
    assert len(kept) == 2

    seen = {}

    def look(run) -> None:
        seen.update({p: p.stat().st_mtime_ns for p in kept})
        relabel(run)

    relabel = steps.relabel
    monkeypatch.setattr(steps, "relabel", look)
    measure(str(root), job(), "00000-0")
    assert seen == kept


def test_a_point_that_diverges_fails_in_words(root, job) -> None:
    with pytest.raises(RunError) as error:
        measure(str(root), job("recover.r_bn=1e300"), "00000-0")
    told = reason_of(error.value)
    assert "unit-00000-00000" in told["reason"]
    assert told["top1"] != told["top1"]


def test_reasons_hold_no_secrets(monkeypatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-open-sesame")
    assert "sesame" not in reason_of(ValueError("denied: sesame-open-sesame"))["reason"]
