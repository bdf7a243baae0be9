"""Recovery through the runners: what is committed, what is redone, and what fails alone."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from recovery_world import ARCHS, CLASSES, DATA, SETS, shard_bytes, stage_of, units_of

from cluster import shards, storage
from cluster.attempts import MAX_ATTEMPTS
from cluster.runner import Row, run_ray, run_serial
from stages.images import to_pixels
from stages.imageset import load_image_set
from stages.recover.stage import is_committed, recover_rows


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
@pytest.mark.parametrize("options", [{"compile": True}, {"precision": "bf16"}], ids=["compiled", "bf16"])
def test_same_bytes_with_ray_by_every_engine(
    serial: tuple[Path, list[Row]], world: tuple[str, Any], tmp_path: Path, ray_local: None, options: dict[str, Any]
) -> None:
    here, there = tmp_path / "serial", tmp_path / "ray"
    rows = recover_rows(units_of(SETS))
    for folder, runner in ((here, run_serial), (there, run_ray)):
        done = list(runner(rows, [stage_of(world, folder, list(ARCHS), actors=2, **options)]))
        assert [row["error"] for row in done] == [""] * len(SETS)
    assert shard_bytes(here) == shard_bytes(there)
    if "precision" in options:
        assert shard_bytes(here) != shard_bytes(serial[0])


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
