import hashlib
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster import shards
from cluster.errors import RunError
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row, run_ray, run_serial
from stages.data import DataSpec
from stages.images import encode_png
from stages.imageset import load_image_set
from stages.relabel.ensemble import combine
from stages.relabel.options import Mix, RelabelOptions
from stages.relabel.stage import CommitStage, TeacherStage, is_committed, relabel_rows, relabel_stages
from stages.relabel.store import LabelReader
from stages.relabel.unit import LabelUnit, plan_units
from stages.teachers.networks import NETWORKS
from stages.teachers.options import TeacherSpec
from stages.teachers.weights import save_weights

CLASSES, IPC, SIZE = 10, 13, 32
COUNT = CLASSES * IPC
DATA = DataSpec(SIZE, 3, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26), tuple(f"class {k}" for k in range(CLASSES)))
ARCHS = {"deep": ("resnet10", {"width": 8}), "flat": ("convnet_d3", {"width": 8})}


@dataclass
class Setup:
    images: str
    teachers: dict[str, TeacherSpec]

    def stages(self, out: Path, options: RelabelOptions, actors: int = 1, identity: str = "one") -> list[ActorStage]:
        return relabel_stages(
            str(out), self.images, self.teachers, DATA, options, 4, identity, ActorResources(actors=actors),
            str(out.parent / "progress"),
        )  # fmt: skip

    def teacher_stage(self, name: str, options: RelabelOptions) -> TeacherStage:
        return TeacherStage(name, self.teachers[name], self.images, DATA, options, 4, gpu=False)


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> Setup:
    """Two untrained teachers of different families, and 130 images in two shards with mixed rows."""
    root = tmp_path_factory.mktemp("relabel")
    rng = np.random.default_rng(0)
    ids = rng.permutation(COUNT)
    for part, chosen in enumerate(np.array_split(ids, 2)):
        coarse = rng.integers(0, 256, (len(chosen), 3, 4, 4), dtype=np.uint8)
        pixels = coarse.repeat(8, axis=2).repeat(8, axis=3)
        rows = [
            {"image": {"bytes": encode_png(p), "path": f"{k}.png"}, "label": k % CLASSES, "image_id": k}
            for p, k in zip(pixels, chosen.tolist(), strict=True)
        ]
        schema = shards.image_schema(list(DATA.class_names), [*shards.IMAGE_FIELDS, pa.field("image_id", pa.int64())])
        shards.write_shard(str(root / "images" / f"part-{part}.parquet"), pa.Table.from_pylist(rows, schema))
    teachers = {}
    for index, (name, (arch, kwargs)) in enumerate(ARCHS.items()):
        with torch.random.fork_rng():
            torch.manual_seed(index)
            network = NETWORKS[arch](num_classes=CLASSES, in_chans=3, **kwargs)
        weights = str(root / f"{name}.safetensors")
        save_weights(weights, network.state_dict())
        teachers[name] = TeacherSpec(arch=f"builtin:{arch}", kwargs=kwargs, weights=weights)
    return Setup(str(root / "images"), teachers)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What the runners set; stages called directly must compute with as many threads to give the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options(**values) -> RelabelOptions:
    return RelabelOptions(**{"teachers": list(ARCHS), "epochs": 34, "batch": 50, **values})


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def errors(rows: list[Row]) -> list[str]:
    return [row["error"] for row in rows if row["error"]]


@pytest.fixture(scope="module")
def labels(setup, tmp_path_factory) -> Path:
    """All labels of the default options, made by the serial runner."""
    out = tmp_path_factory.mktemp("labels")
    rows = list(run_serial(relabel_rows(plan_units(COUNT, CLASSES, options())), setup.stages(out, options())))
    assert not errors(rows)
    assert {frozenset(row) for row in rows} == {frozenset(["id", "error", "rows", "sizes", "attempt", "cpu_seconds"])}
    assert sum(row["rows"] for row in rows) == COUNT * 34
    return out


@pytest.mark.parametrize("kind", ["none", "cutmix", "mixup"])
@pytest.mark.parametrize("batch", [7, 50, 128])
def test_students_see_exactly_what_the_teachers_saw(setup, tmp_path, kind, batch):
    """Teachers label in batches of 50; a student slices positions in its own batches."""
    chosen = options(epochs=2, mix=Mix(kind=kind))
    units = plan_units(COUNT, CLASSES, chosen)
    seen: dict[str, list[torch.Tensor]] = {}
    logits = {}
    for name in ARCHS:
        stage = setup.teacher_stage(name, chosen)
        network = stage.teacher

        def spy(x, name=name, network=network):
            seen.setdefault(name, []).append(x.clone())
            return network(x)

        stage.teacher = spy
        logits[name] = np.concatenate([stage.label(unit) for unit in units])
    assert not errors(list(run_serial(relabel_rows(units), setup.stages(tmp_path, chosen))))

    reader, images = LabelReader(str(tmp_path), DATA), load_image_set(setup.images, DATA).images
    for epoch in range(2):
        found = reader.read_epoch(epoch)
        positions = np.arange(COUNT)
        student = torch.cat([found.render(images, positions[at : at + batch], DATA) for at in range(0, COUNT, batch)])
        rows = slice(epoch * COUNT, (epoch + 1) * COUNT)
        for name in ARCHS:
            assert torch.equal(student, torch.cat(seen[name])[rows])
        parts = [
            combine([torch.from_numpy(logits[n][rows][at : at + 50]) for n in ARCHS], chosen)
            for at in range(0, COUNT, 50)
        ]
        assert np.array_equal(found.logits, torch.cat(parts).to(torch.float16).numpy())
        # The views matter to the teachers, so equal pixels are no accident of blank images.
        assert len(torch.unique(student[:, 0, 5, 5])) > 20


def test_labels_do_not_depend_on_the_partition(setup, labels):
    """One batch at a time gives the logits of the whole unit."""
    stage = setup.teacher_stage("deep", options())
    unit = plan_units(COUNT, CLASSES, options())[3]
    whole = stage.label(unit)
    for index, (epoch, start, stop) in enumerate(unit.batches(50)):
        alone = LabelUnit(
            epoch_start=epoch,
            epoch_stop=epoch + 1,
            position_start=start,
            position_stop=stop,
            num_images=COUNT,
        )
        at = (epoch - unit.epoch_start) * COUNT + start
        assert np.array_equal(stage.label(alone), whole[at : at + stop - start]), index


def test_teachers_are_in_eval_mode(setup):
    """A view's logits are those of the bare network in eval mode, whatever images are beside it."""
    stage = setup.teacher_stage("deep", options(epochs=1, batch=50))
    unit = plan_units(COUNT, CLASSES, options(epochs=1, batch=50))[0]
    one_by_one = setup.teacher_stage("deep", options(epochs=1, batch=1))
    np.testing.assert_allclose(stage.label(unit), one_by_one.label(unit), rtol=1e-4, atol=1e-5)


def test_resume_redoes_what_is_missing_or_damaged_and_nothing_else(setup, labels):
    units = plan_units(COUNT, CLASSES, options())
    before = hashes(labels)
    assert all(is_committed(str(labels), u, "one") for u in units)
    assert not is_committed(str(labels), units[0], "other")

    (labels / f"{units[2].id}.parquet").unlink()
    truncated = labels / f"{units[5].id}.parquet"
    truncated.write_bytes(truncated.read_bytes()[:-20])
    foreign = labels / f"{units[7].id}.parquet"
    foreign.write_bytes((labels / f"{units[8].id}.parquet").read_bytes())
    pending = [u for u in units if not is_committed(str(labels), u, "one")]
    assert [u.id for u in pending] == [units[k].id for k in (2, 5, 7)]

    times = {p.name: p.stat().st_mtime_ns for p in labels.iterdir()}
    assert not errors(list(run_serial(relabel_rows(pending), setup.stages(labels, options()))))
    assert hashes(labels) == before
    changed = {p.name for p in labels.iterdir() if p.stat().st_mtime_ns != times.get(p.name)}
    assert changed == {f"{u.id}.parquet" for u in pending}


CHILD = """
import pickle, sys
from cluster.runner import run_serial
rows, stages = pickle.load(sys.stdin.buffer)
for row in run_serial(rows, stages):
    assert not row["error"], row["error"]
"""


def test_killed_run_resumes_to_the_same_bytes(setup, labels, tmp_path):
    units = plan_units(COUNT, CLASSES, options())
    job = pickle.dumps((relabel_rows(units), setup.stages(tmp_path, options())))
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE) as child:
        child.stdin.write(job)
        child.stdin.close()
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("labels-*"))) < 2 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("labels-*")}
    pending = [u for u in units if not is_committed(str(tmp_path), u, "one")]
    assert {f"{u.id}.parquet" for u in units} - {f"{u.id}.parquet" for u in pending} == set(times)
    assert pending
    assert not errors(list(run_serial(relabel_rows(pending), setup.stages(tmp_path, options()))))
    assert {n: h for n, h in hashes(tmp_path).items() if n.startswith("labels-")} == hashes(labels)
    assert all((tmp_path / name).stat().st_mtime_ns == at for name, at in times.items())


def test_broken_units_fail_in_words_and_others_go_on(setup, tmp_path):
    good = plan_units(COUNT, CLASSES, options())[:2]
    wrong = LabelUnit(epoch_start=9, epoch_stop=10, position_start=0, position_stop=50, num_images=COUNT + 1)
    rows = list(run_serial(relabel_rows([wrong, *good]), setup.stages(tmp_path, options())))
    assert "130 images where the plan has 131" in errors(rows)[0]
    assert [row["id"] for row in rows if not row["error"]] == [u.id for u in good]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{u.id}.parquet" for u in good]


def test_logits_that_cannot_be_stored_are_refused(setup, tmp_path):
    unit = plan_units(COUNT, CLASSES, options())[0]
    (row,) = relabel_rows([unit])
    stage = setup.teacher_stage("deep", options())
    network = stage.teacher
    stage.teacher = lambda x: network(x) / 0
    with pytest.raises(RunError, match=r"teacher deep gives logits that are not finite; check teachers\.deep"):
        stage(row)
    commit = CommitStage(str(tmp_path), DATA, options(), 4, "one")
    huge = np.full((unit.num_rows, CLASSES), 1e6, np.float32)
    with pytest.raises(RunError, match="combined logits exceed ±65504"):
        commit({**row, "logits_deep": huge, "logits_flat": huge})
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
@pytest.mark.parametrize("actors", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ray_gives_the_bytes_of_the_serial_runner(setup, labels, tmp_path, ray_local, actors):
    """Also with arrays of several lengths between the stages and a unit that fails in the first."""
    wrong = LabelUnit(epoch_start=40, epoch_stop=41, position_start=0, position_stop=50, num_images=COUNT + 1)
    units = plan_units(COUNT, CLASSES, options())
    assert len({u.num_rows for u in units}) == 2
    rows = list(run_ray(relabel_rows([units[0], wrong, *units[1:]]), setup.stages(tmp_path, options(), actors)))
    assert [e for e in errors(rows) if "where the plan has 131" not in e] == []
    assert sorted(row["id"] for row in rows) == sorted([*(u.id for u in units), wrong.id])
    assert hashes(tmp_path) == hashes(labels)
