"""One job: what it measures is what a run measures, it goes on where it was, and units are shared by content."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cluster import storage
from cluster.errors import RunError, TransientError
from pipeline.config import Config
from pipeline.loading import load_config
from pipeline.run import execute
from pipeline.search.measure import lighten, look_up, measure
from pipeline.search.trial import PREPARED
from stages.recover.stage import RecoverStage

BOTH = "recover.bn_teachers=[res, conv]"
SOURCE = """
from stages.teachers.networks import NETWORKS


def make(num_classes):
    return NETWORKS["convnet_d3"](num_classes=num_classes, in_chans=3, width={width})
"""


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
        return lighten(load_config(str(tiny_config()), words), 1, False, list(seeds))

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
    assert not list((root / "jobs").iterdir())
    assert len(files(root)) == 2 * 2


def test_what_was_measured_is_not_measured_again(root, job) -> None:
    first = measure(str(root), job(), "00000-0")
    shutil.rmtree(root / "units")
    assert measure(str(root), job(), "00007-2") == first
    assert not (root / "units").exists()


def test_nor_where_files_were_moved(root, job, tmp_path) -> None:
    """What changes no result is not part of what a measurement is known by."""
    measure(str(root), job(), "00000-0")
    moved = job(f"squeeze.cache={tmp_path / 'cache'}", "recover.checkpoint_every=7", "name=other")
    assert look_up(str(root), moved) is not None
    # Nor by whether there was a probe when it was measured.
    probed = moved.resources.model_copy(update={"probe": True})
    assert look_up(str(root), moved.model_copy(update={"resources": probed})) is not None
    assert look_up(str(root), job("recover.lr=0.2")) is None
    assert look_up(str(root), job("evaluate.protocol.lr=0.2")) is None
    assert look_up(str(root), job(seeds=(1,))) is None


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


def test_units_of_other_code_of_the_same_name_are_not_shared(root, job, monkeypatch) -> None:
    from pipeline.search import measure as module

    measure(str(root), job(), "00000-0")
    monkeypatch.setattr(module, "code_sha256", lambda arch: "another")
    assert measure(str(root), job(), "00001-0").units_shared == 0


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
    kept = {p: p.stat().st_mtime_ns for p in (root / "jobs").glob("00000-0-*/recovered/*")}
    assert len(kept) == 2

    seen = {}

    def look(run) -> None:
        seen.update({p: p.stat().st_mtime_ns for p in kept})
        relabel(run)

    relabel = steps.relabel
    monkeypatch.setattr(steps, "relabel", look)
    measure(str(root), job(), "00000-0")
    assert seen == kept


def test_what_another_point_left_under_the_same_name_is_not_taken(root, job, monkeypatch) -> None:
    """Killed when all was done but the figures: labels and students of one pool are not those of another."""
    from pipeline.search import measure as module

    with monkeypatch.context() as patch:
        patch.setattr(module.storage, "write_json", _interrupt(module.storage.write_json, "measured"))
        with pytest.raises(KeyboardInterrupt):
            measure(str(root), job(BOTH), "00000-0")
    assert list((root / "jobs").glob("00000-0-*/eval/*.json"))
    alone = measure(str(root), job("recover.bn_teachers=[conv]", "recover.logit_teachers=[conv]"), "00001-0")
    shutil.rmtree(root / "measured")
    again = measure(str(root), job("recover.bn_teachers=[conv]", "recover.logit_teachers=[conv]"), "00000-0")
    assert again.top1_seeds == alone.top1_seeds


def _interrupt(real, part: str):
    def write(uri: str, value) -> None:
        if f"/{part}/" in uri:
            raise KeyboardInterrupt
        real(uri, value)

    return write


def test_a_point_that_diverges_fails_in_words_and_is_not_tried_again(root, job) -> None:
    config = job("recover.r_bn=1e300")
    assert look_up(str(root), config) is None
    with pytest.raises(RunError, match="unit-00000-00000"):
        measure(str(root), config, "00000-0")
    assert "unit-00000-00000" in (look_up(str(root), config) or {})["reason"]
    assert not list((root / "jobs").iterdir())
    with pytest.raises(RunError, match="unit-00000-00000"):
        measure(str(root), config, "00005-0")


def test_what_the_machine_does_is_no_result(root, job, monkeypatch) -> None:
    """A full disk is not the point's fault: nothing is recorded, the job is run again."""
    from pipeline import steps

    def full(run) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(steps, "relabel", full)
        with pytest.raises(OSError, match="No space left"):
            measure(str(root), job(), "00000-0")
    assert look_up(str(root), job()) is None
    measure(str(root), job(), "00000-0")
    assert look_up(str(root), job()) is not None


@pytest.mark.parametrize(
    "failure",
    [OSError(28, "No space left on device"), torch.OutOfMemoryError("out of memory"), TransientError("s3://b: away")],
)
def test_nor_what_it_does_inside_a_stage(root, job, monkeypatch, failure) -> None:
    def fail(stage, row) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(RecoverStage, "__call__", fail)
        with pytest.raises(type(failure)):
            measure(str(root), job(), "00000-0")
    assert look_up(str(root), job()) is None
    assert measure(str(root), job(), "00000-0").units == 2


def test_a_users_network_counts_by_its_code(root, tiny_config, tmp_path) -> None:
    code = tmp_path / "nets.py"

    def config():
        words = ["recover.selection=fixed"]
        student = {"mine": {"arch": f"user:{code}:make"}}
        return lighten(load_config(str(tiny_config(evaluate={"students": student})), words), 1, False, [0])

    source = SOURCE
    code.write_text(source.format(width=4))
    measure(str(root), config(), "00000-0")
    assert look_up(str(root), config()) is not None
    code.write_text(source.format(width=8))
    assert look_up(str(root), config()) is None
