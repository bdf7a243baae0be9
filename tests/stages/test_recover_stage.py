"""Recovery through the runners: what is committed, what is redone, and what fails alone."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cluster import preemption, shards, storage
from cluster.attempts import MAX_ATTEMPTS
from cluster.errors import HelperLost
from cluster.progress import read_progress
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row, run_ray, run_serial
from stages.data import DataSpec
from stages.images import to_pixels
from stages.imageset import load_image_set
from stages.recover.options import RecoverOptions
from stages.recover.stage import is_committed, recover_rows, recover_stage
from stages.recover.unit import RecoverUnit
from stages.teachers.build import build_network
from stages.teachers.options import TeacherSpec
from stages.teachers.weights import save_weights

CLASSES = ("cat", "dog", "owl")
DATA = DataSpec(16, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), CLASSES)
ARCHS = {
    "res": ("builtin:resnet10", {"width": 8}),
    "conv": ("builtin:convnet_d3", {"width": 8}),
    "mobile": ("builtin:mobilenetv2", {"width_mult": 0.25}),
}
# Fails while recovering only, so that loading (which tries a teacher out) succeeds.
BROKEN = '''
import os
import pathlib
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, kill):
        super().__init__()
        self.bn, self.head, self.kill = nn.BatchNorm2d(3), nn.Linear(3, classes), kill

    def forward(self, x):
        if x.requires_grad and self.kill:
            os._exit(1)
        out = self.head(self.bn(x).mean((2, 3)))
        return out * float("nan") if x.requires_grad else out

class Once(nn.Module):
    """Ends its process at the fifth step, the first time that any gets there."""

    def __init__(self, classes):
        super().__init__()
        self.bn, self.head, self.steps = nn.BatchNorm2d(3), nn.Linear(3, classes), 0
        self.marker = pathlib.Path(__file__).with_name("once")

    def forward(self, x):
        self.steps += x.requires_grad
        if self.steps == 5 and not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        return self.head(self.bn(x).mean((2, 3)))

def once(num_classes): return Once(num_classes)
def nan(num_classes): return Net(num_classes, False)
def kill(num_classes): return Net(num_classes, True)
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, TeacherSpec]]:
    """Real-looking data in two shards of two row groups each, and teachers with random weights and statistics."""
    root = tmp_path_factory.mktemp("recover")
    rng = np.random.default_rng(0)
    schema = shards.image_schema(list(CLASSES))
    for shard in range(2):
        rows = []
        for row in range(9):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG" if row % 2 else "PNG")
            path = f"{CLASSES[row % 3]}/{shard}-{row}.png" if shard else None
            rows.append({"image": {"bytes": stream.getvalue(), "path": path}, "label": row % 3})
        table = pa.Table.from_pylist(rows, schema=schema)
        shards.write_shard(str(root / "data" / f"part-{shard}.parquet"), table, row_group_size=5)
    shards.save_dataset(
        shards.Dataset(
            uri=str(root / "data"), class_names=list(CLASSES), channels=3, image_size=None,
            mean=list(DATA.mean), std=list(DATA.std), shards=[("part-0.parquet", 9), ("part-1.parquet", 9)],
            class_counts=[6, 6, 6], fingerprint="f",
        )
    )  # fmt: skip
    (root / "broken.py").write_text(BROKEN)
    archs = {**ARCHS, "nan": (f"user:{root}/broken.py:nan", {}), "kill": (f"user:{root}/broken.py:kill", {}),
             "once": (f"user:{root}/broken.py:once", {})}  # fmt: skip
    specs = {}
    for index, (name, (arch, kwargs)) in enumerate(archs.items()):
        spec = TeacherSpec(arch=arch, kwargs=kwargs, weights=str(root / f"{name}.safetensors"))
        network = build_network(spec, len(CLASSES), 3, seed=index)
        state = network.state_dict()
        noise = torch.Generator().manual_seed(index)
        for key, value in state.items():
            if key.endswith("running_mean"):
                state[key] = 0.3 * torch.randn(value.shape, generator=noise)
            elif key.endswith("running_var"):
                state[key] = 0.5 + torch.rand(value.shape, generator=noise)
        save_weights(spec.weights or "", state)
        specs[name] = spec
    return str(root / "data"), specs


def units_of(teacher_sets: Sequence[Sequence[str]], iterations: int = 6) -> list[RecoverUnit]:
    """One unit per set, with sources spread over shards and row groups."""
    return [
        RecoverUnit(
            ipc=i, chunk=0, classes=[0, 1, 2], logit_teachers=[names[0]], bn_teachers=list(names),
            iterations=iterations + i, seed=100 + i,
            sources=[(i % 2, 3 * (i % 3)), ((i + 1) % 2, 3 * (i % 3) + 1), (i % 2, 8 - 3 * (i % 3))],
        )
        for i, names in enumerate(teacher_sets)
    ]  # fmt: skip


SETS = [["res"], ["res", "conv"], ["res", "mobile", "conv"], ["conv", "mobile"]]


def stage_of(world: tuple[str, dict[str, TeacherSpec]], out: Path, names: Sequence[str], **change: Any) -> ActorStage:
    train, specs = world
    actors, placement = change.pop("actors", 1), change.pop("placement", "colocated")
    options = RecoverOptions(logit_teachers=[names[0]], bn_teachers=list(names), selection="fixed", roll=3, **change)
    return recover_stage(str(out), train, specs, DATA, options, "identity-1", ActorResources(actors=actors), placement)


def shard_bytes(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for f in ("init", "recovered") for p in sorted((out / f).iterdir())}


@pytest.fixture(scope="module")
def serial(
    world: tuple[str, dict[str, TeacherSpec]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Row]]:
    out = tmp_path_factory.mktemp("serial")
    stage = stage_of(world, out, list(ARCHS))
    return out, list(run_serial(recover_rows(units_of(SETS)), [stage]))


def test_rows_are_small_and_complete(serial: tuple[Path, list[Row]]) -> None:
    _, rows = serial
    # Longest first: steps × networks.
    assert [row["id"] for row in rows] == [f"unit-0000{i}-00000" for i in (2, 3, 1, 0)]
    for row in rows:
        names = {"id", "error", "seconds", "images", "loss_ce", "iterations", "attempt", "sizes", "cpu_seconds"}
        assert set(row) == names
        assert (row["error"], row["attempt"]) == ("", 1)


def test_recovered_shard(serial: tuple[Path, list[Row]]) -> None:
    out, rows = serial
    unit = units_of(SETS)[2]
    table = pq.read_table(out / "recovered" / f"{unit.id}.parquet")
    assert table.schema.names == [f.name for f in shards.RECOVERED_FIELDS]
    found = table.to_pylist()
    assert [r["label"] for r in found] == [0, 1, 2]
    assert [r["image_id"] for r in found] == [6, 7, 8]
    assert [r["image"]["path"] for r in found] == ["00000/00002.png", "00001/00002.png", "00002/00002.png"]
    # Sources: shard 0 kept no paths, shard 1 did.
    assert [r["source_id"] for r in found] == ["part-0.parquet:6", "dog/1-7.png", "part-0.parquet:2"]
    loss_ce = next(r["loss_ce"] for r in rows if r["id"] == unit.id)
    for r in found:
        assert (r["ipc"], r["iterations"], r["unit_seed"], r["logit_teacher"]) == (2, 8, 102, "res")
        assert r["bn_teachers"] == ["res", "mobile", "conv"]
        assert len(r["loss_bn"]) == 3
        assert min(r["loss_bn"]) > 0
        assert r["loss_ce"] == loss_ce
        assert Image.open(io.BytesIO(r["image"]["bytes"])).format == "PNG"
    metadata = shards.shard_metadata(str(out / "recovered" / f"{unit.id}.parquet"))
    assert metadata is not None
    assert metadata["class_names"] == list(CLASSES)
    assert metadata["identity"] == "identity-1"
    assert metadata["unit"]["seed"] == 102
    assert [entry["step"] for entry in metadata["log"]] == [0, 7]


def test_init_shard_holds_the_real_images(serial: tuple[Path, list[Row]], world: tuple[str, Any]) -> None:
    out, _ = serial
    for unit in units_of(SETS):
        init = pq.read_table(out / "init" / f"{unit.id}.parquet").to_pylist()
        recovered = pq.read_table(out / "recovered" / f"{unit.id}.parquet").to_pylist()
        for (shard, row), start, end in zip(unit.sources, init, recovered, strict=True):
            real = pq.read_table(f"{world[0]}/part-{shard}.parquet")["image"][row].as_py()["bytes"]
            expected = to_pixels(real, 16, 3)
            np.testing.assert_array_equal(to_pixels(start["image"]["bytes"], 16, 3), expected)
            assert (to_pixels(end["image"]["bytes"], 16, 3) != expected).mean() > 0.5
            assert start["loss_ce"] is None
            assert [start[k] for k in ("image_id", "label", "source_id")] == [
                end[k] for k in ("image_id", "label", "source_id")
            ]
    assert len(load_image_set(str(out / "recovered"), DATA)) == len(load_image_set(str(out / "init"), DATA)) == 12


@pytest.mark.parametrize("folder", ["init", "recovered"])
def test_hugging_face_datasets_reads_the_shards(
    serial: tuple[Path, list[Row]], tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    files = sorted(str(p) for p in (serial[0] / folder).iterdir())
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert loaded.features["label"].names == list(CLASSES)
    assert len(loaded) == 12
    found = load_image_set(str(serial[0] / folder), DATA)
    for row in loaded:
        np.testing.assert_array_equal(np.asarray(row["image"]).transpose(2, 0, 1), found.images[row["image_id"]])


def test_noise_units_have_no_init(world: tuple[str, Any], tmp_path: Path) -> None:
    unit = units_of([["res"]], iterations=2)[0].model_copy(update={"sources": []})
    (row,) = run_serial(recover_rows([unit]), [stage_of(world, tmp_path, ["res"], init="noise")])
    assert row["error"] == ""
    assert not (tmp_path / "init").exists()
    assert is_committed(str(tmp_path), unit, "identity-1")
    found = pq.read_table(tmp_path / "recovered" / f"{unit.id}.parquet")
    assert found["source_id"].to_pylist() == [None] * 3


def test_is_committed_only_when_whole_and_own(serial: tuple[Path, list[Row]], tmp_path: Path) -> None:
    out, _ = serial
    for folder in ("init", "recovered"):
        (tmp_path / folder).mkdir()
        for file in (out / folder).iterdir():
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    units, run = units_of(SETS), str(tmp_path)
    bare = [u.model_copy(update={"sources": []}) for u in units]
    assert all(is_committed(run, u, "identity-1") for u in units + bare)
    assert not is_committed(run, units[0], "identity-2")
    assert not is_committed(run, units[0].model_copy(update={"seed": 1}), "identity-1")
    assert not is_committed(run, units[0].model_copy(update={"chunk": 1}), "identity-1")
    half = tmp_path / "recovered" / f"{units[1].id}.parquet"
    half.write_bytes(half.read_bytes()[:-200])
    assert not is_committed(run, units[1], "identity-1")
    (tmp_path / "init" / f"{units[2].id}.parquet").unlink()
    assert not is_committed(run, units[2], "identity-1")
    alien = tmp_path / "recovered" / f"{units[3].id}.parquet"
    table = pq.read_table(alien)
    pq.write_table(table.slice(0, 2), alien)
    assert not is_committed(run, units[3], "identity-1")


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([(0, 1), (0, 1), (0, 2)], "part-0.parquet:1 has label 1 where the plan has 0"),
        ([(0, 99), (0, 1), (0, 2)], "row 99 is not readable"),
    ],
)
def test_data_that_changed_under_the_plan(
    world: tuple[str, Any], tmp_path: Path, sources: list[tuple[int, int]], words: str
) -> None:
    unit = units_of([["res"]])[0].model_copy(update={"sources": sources})
    (row,) = run_serial(recover_rows([unit]), [stage_of(world, tmp_path, ["res"])])
    assert words in row["error"]
    assert not (tmp_path / "recovered").exists()


def test_unreadable_source_image_is_named(world: tuple[str, Any], tmp_path: Path) -> None:
    dataset = shards.load_dataset(world[0])
    table = shards.read_shard(dataset.shard_uri(0))
    rows = table.to_pylist()
    rows[4]["image"]["bytes"] = rows[4]["image"]["bytes"][:200]
    bad = tmp_path / "data"
    shards.write_shard(str(bad / "part-0.parquet"), pa.Table.from_pylist(rows, schema=table.schema))
    (bad / "part-1.parquet").write_bytes(storage.read_bytes(dataset.shard_uri(1)))
    (bad / "dataset.json").write_bytes(storage.read_bytes(f"{world[0]}/dataset.json"))
    unit = units_of([["res"]])[0].model_copy(update={"sources": [(0, 0), (0, 4), (0, 2)]})
    (row,) = run_serial(recover_rows([unit]), [stage_of((str(bad), world[1]), tmp_path / "out", ["res"])])
    assert "part-0.parquet:4 is not a readable image" in row["error"]


def test_attempts_are_counted_and_limited_within_a_run(world: tuple[str, Any], tmp_path: Path) -> None:
    stage = stage_of(world, tmp_path, ["res"])
    unit = units_of([["res"]], iterations=1)[0]
    record = tmp_path / "progress" / "recover" / f"{unit.id}.json"
    record.parent.mkdir(parents=True)

    def left_behind(session: str, attempts: int) -> Row:
        found = {"attempt": 5, "session": session, "session_attempt": attempts, "from": 0, "key": "identity-1"}
        record.write_text(json.dumps({"done": 0, "total": 1, **found}))
        shutil.rmtree(tmp_path / "recovered", ignore_errors=True)
        (row,) = run_serial(recover_rows([unit]), [stage])
        return row

    assert left_behind("an earlier run", MAX_ATTEMPTS)["attempt"] == 6
    assert left_behind(stage.kwargs["session"], MAX_ATTEMPTS - 1)["attempt"] == 6
    assert json.loads(record.read_text())["done"] == 1
    lost = left_behind(stage.kwargs["session"], MAX_ATTEMPTS)
    assert f"{unit.id} (seed 100) lost its worker {MAX_ATTEMPTS} times" in lost["error"]
    assert "lower resources.recover.actors or recover.chunk" in lost["error"]


def test_a_committed_unit_that_is_asked_for_again_is_not_redone(
    world: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray does when the machine that held the result is lost."""
    stage = stage_of(world, tmp_path, ["res"])
    unit = units_of([["res"]])[0]
    (first,) = run_serial(recover_rows([unit]), [stage])
    monkeypatch.setattr("stages.recover.stage.recover_unit", None)
    (again,) = run_serial(recover_rows([unit]), [stage])
    spent = {"seconds": 0, "cpu_seconds": 0}
    assert again | spent == first | spent


class Lost(BaseException):
    """The process is gone."""


def cut_short(stage: ActorStage, unit: RecoverUnit, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a unit until its worker is lost after a step."""
    from stages.recover import core

    def disturbed(*args: Any, on_step: Any, **more: Any) -> Any:
        def step(done: int, total: int) -> None:
            if done == at:
                raise Lost
            on_step(done, total)

        return core.recover_unit(*args, on_step=step, **more)

    with monkeypatch.context() as patch:
        patch.setattr("stages.recover.stage.recover_unit", disturbed)
        with pytest.raises(Lost):
            list(run_serial(recover_rows([unit]), [stage]))


def steps_made(stage: ActorStage, unit: RecoverUnit, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run a unit to its end; the steps it made."""
    from stages.recover import core

    made: list[int] = []

    def watched(*args: Any, on_step: Any, **more: Any) -> Any:
        return core.recover_unit(*args, on_step=lambda done, total: made.append(done), **more)

    with monkeypatch.context() as patch:
        patch.setattr("stages.recover.stage.recover_unit", watched)
        (row,) = run_serial(recover_rows([unit]), [stage])
    assert row["error"] == ""
    return made


def test_a_unit_goes_on_from_its_kept_state(
    serial: tuple[Path, list[Row]], world: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = units_of(SETS)[2]  # 8 steps
    stage = stage_of(world, tmp_path, list(ARCHS), checkpoint_every=3)
    state = tmp_path / "progress" / "state" / f"{unit.id}.safetensors"
    cut_short(stage, unit, 8, monkeypatch)
    assert [p.name for p in state.parent.iterdir()] == [state.name]
    assert steps_made(stage, unit, monkeypatch) == [7, 8]
    assert not state.exists()
    assert read_progress(str(tmp_path / "progress" / "recover"))[unit.id]["attempt"] == 2
    for name, content in shard_bytes(tmp_path).items():
        assert content == (serial[0] / name).read_bytes()


@pytest.mark.parametrize("damage", ["identity", "unit", "cut", "flip"])
def test_a_foreign_or_damaged_state_is_ignored(
    serial: tuple[Path, list[Row]], world: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    unit = units_of(SETS)[2]
    stage = stage_of(world, tmp_path, list(ARCHS), checkpoint_every=3)
    other = unit.model_copy(update={"seed": 1}) if damage == "unit" else unit
    foreign = dataclasses.replace(stage, kwargs={**stage.kwargs, "identity": "other"})
    cut_short(foreign if damage == "identity" else stage, other, 7, monkeypatch)
    state = tmp_path / "progress" / "state" / f"{unit.id}.safetensors"
    content = bytearray(state.read_bytes())
    if damage == "cut":
        del content[-1]
    elif damage == "flip":
        content[-1] ^= 1
    state.write_bytes(content)
    assert steps_made(stage, unit, monkeypatch) == list(range(1, 9))
    assert not state.exists()
    for name, content in shard_bytes(tmp_path).items():
        assert content == (serial[0] / name).read_bytes()


def test_without_checkpoints_only_a_notice_keeps_the_state(
    serial: tuple[Path, list[Row]], world: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = units_of(SETS)[2]
    stage = stage_of(world, tmp_path, list(ARCHS))
    folder = tmp_path / "progress" / "state"
    cut_short(stage, unit, 7, monkeypatch)
    assert not folder.exists()
    looks = iter([False, False, False, True])
    monkeypatch.setattr(preemption, "noticed", lambda: next(looks))

    def leave() -> None:
        raise Lost

    monkeypatch.setattr(preemption, "leave", leave)
    with pytest.raises(Lost):
        list(run_serial(recover_rows([unit]), [stage]))
    monkeypatch.setattr(preemption, "noticed", lambda: False)
    record = read_progress(str(tmp_path / "progress" / "recover"))[unit.id]
    # The second start, but the first that counts.
    assert (record["done"], record["attempt"], record["session_attempt"]) == (4, 2, 1)
    assert steps_made(stage, unit, monkeypatch) == [5, 6, 7, 8]
    for name, content in shard_bytes(tmp_path).items():
        assert content == (serial[0] / name).read_bytes()


def test_a_state_that_cannot_be_kept_does_not_fail_the_unit(
    world: tuple[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unit = units_of(SETS)[0]
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "state").touch()
    (row,) = run_serial(recover_rows([unit]), [stage_of(world, tmp_path, ["res"], checkpoint_every=4)])
    assert row["error"] == ""
    assert "the state after step 4 could not be kept" in caplog.text


@pytest.mark.ray
@pytest.mark.parametrize("actors", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_same_bytes_with_ray(
    serial: tuple[Path, list[Row]], world: tuple[str, Any], tmp_path: Path, ray_local: None, actors: int
) -> None:
    stage = stage_of(world, tmp_path, list(ARCHS), actors=actors)
    rows = list(run_ray(recover_rows(units_of(SETS)), [stage]))
    assert [row["error"] for row in rows] == [""] * len(SETS)
    assert shard_bytes(tmp_path) == shard_bytes(serial[0])


@pytest.mark.ray
@pytest.mark.slow
def test_one_unit_fails_and_the_others_go_on(world: tuple[str, Any], tmp_path: Path, ray_local: None) -> None:
    """One unit's loss is NaN; another kills its worker every time, as running out of memory does."""
    units = units_of([["res"], ["nan"], ["kill"], ["conv"], ["res", "conv"]], iterations=2)
    stage = stage_of(world, tmp_path, ["res", "conv", "nan", "kill"], actors=2)
    rows = {row["id"]: row["error"] for row in run_ray(recover_rows(units), [stage])}
    assert sorted(rows) == [u.id for u in units]
    assert "unit-00001-00000 (seed 101): the loss is not finite at step 0 of 3" in rows[units[1].id]
    assert f"unit-00002-00000 (seed 102) lost its worker {MAX_ATTEMPTS} times" in rows[units[2].id]
    for index, unit in enumerate(units):
        assert is_committed(str(tmp_path), unit, "identity-1") == (index not in (1, 2))
        assert bool(rows[unit.id]) == (index in (1, 2))


def pixels_of(out: Path, unit: RecoverUnit) -> np.ndarray:
    rows = pq.read_table(out / "recovered" / f"{unit.id}.parquet").to_pylist()
    return np.stack([to_pixels(row["image"]["bytes"], 16, 3) for row in rows]).astype(int)


@pytest.fixture(scope="module")
def split_serial(world: tuple[str, dict[str, TeacherSpec]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every teacher by itself, in this process."""
    out = tmp_path_factory.mktemp("split")
    stage = stage_of(world, out, list(ARCHS), placement="per_teacher")
    assert [row["error"] for row in run_serial(recover_rows(units_of(SETS)), [stage])] == [""] * len(SETS)
    return out


def test_per_teacher_agrees_with_colocated(split_serial: Path, serial: tuple[Path, list[Row]]) -> None:
    for unit in units_of(SETS):
        gap = np.abs(pixels_of(split_serial, unit) - pixels_of(serial[0], unit))
        assert gap.mean() < 0.1
        parts, whole = (
            pq.read_table(out / "recovered" / f"{unit.id}.parquet").to_pylist()[0] for out in (split_serial, serial[0])
        )
        assert parts["loss_ce"] == pytest.approx(whole["loss_ce"], rel=1e-3)
        assert parts["loss_bn"] == pytest.approx(whole["loss_bn"], rel=1e-3)


def test_teachers_actors_that_die_while_they_load_are_bounded_too(
    world: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*args: Any) -> None:
        raise HelperLost("killed")

    def leave() -> None:
        raise Lost

    monkeypatch.setattr("stages.recover.stage.split_objective", dies)
    monkeypatch.setattr(preemption, "leave", leave)
    stage = stage_of(world, tmp_path, ["res"], placement="per_teacher")
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(Lost):
            list(run_serial(recover_rows(units_of([["res"]])), [stage]))
    (row,) = run_serial(recover_rows(units_of([["res"]])), [stage])
    assert "lost its worker 3 times" in row["error"]


@pytest.mark.ray
def test_per_teacher_has_actors_of_its_own(
    split_serial: Path, world: tuple[str, Any], tmp_path: Path, ray_local: None
) -> None:
    stage = stage_of(world, tmp_path, list(ARCHS), placement="per_teacher")
    rows = list(run_ray(recover_rows(units_of(SETS)), [stage]))
    assert [row["error"] for row in rows] == [""] * len(SETS)
    assert shard_bytes(tmp_path) == shard_bytes(split_serial)


@pytest.mark.ray
@pytest.mark.slow
def test_the_death_of_a_teachers_actor_restarts_the_unit(
    world: tuple[str, Any], tmp_path: Path, ray_local: None
) -> None:
    """In its middle: the pixels are still there."""
    units = units_of([["res", "once"]], iterations=8)
    marker = Path(world[0]).parent / "once"
    marker.touch()
    stage = stage_of(world, tmp_path / "whole", ["res", "once"], placement="per_teacher")
    assert [row["error"] for row in run_serial(recover_rows(units), [stage])] == [""]
    marker.unlink()
    stage = stage_of(world, tmp_path / "cut", ["res", "once"], placement="per_teacher")
    (row,) = run_ray(recover_rows(units), [stage])
    assert (row["error"], row["attempt"]) == ("", 2)
    assert marker.exists()
    record = read_progress(str(tmp_path / "cut" / "progress" / "recover"))[units[0].id]
    assert record["from"] == 4
    assert shard_bytes(tmp_path / "cut") == shard_bytes(tmp_path / "whole")
