import json
import os
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import shards
from cluster.errors import RunError
from stages.data import DataSpec
from stages.relabel.options import RelabelOptions
from stages.relabel.store import LabelReader, write_labels
from stages.relabel.unit import MAX_SHARD_LOGITS, MAX_SHARD_ROWS, LabelUnit, label_bytes, plan_units
from stages.relabel.views import draw_views

SIZE = 32


def write(uri: str, unit: LabelUnit, options: RelabelOptions, classes: int = 10, identity: str = "one") -> np.ndarray:
    rng = np.random.default_rng(unit.epoch_start * 1000 + unit.position_start)
    logits = rng.standard_normal((unit.num_rows, classes)).astype(np.float16)
    views = [draw_views(0, e, unit.num_images, SIZE, options) for e in range(unit.epoch_start, unit.epoch_stop)]
    names = [f"class {k}" for k in range(classes)]
    write_labels(uri, unit, views, logits, options.batch, {"class_names": names, "identity": identity})
    return logits


def write_all(uri: str, num_images: int, options: RelabelOptions, **values) -> np.ndarray:
    """Logits [epochs, positions, classes] of the whole plan."""
    out = None
    for unit in plan_units(num_images, values.get("classes", 10), options):
        logits = write(uri, unit, options, **values)
        out = np.zeros((options.epochs, num_images, logits.shape[1]), np.float16) if out is None else out
        out[unit.epoch_start : unit.epoch_stop, unit.position_start : unit.position_stop] = logits.reshape(
            unit.epoch_stop - unit.epoch_start, -1, logits.shape[1]
        )
    return out


@settings(max_examples=150)
@given(
    count=st.integers(1, 40000),
    classes=st.sampled_from([2, 2048, 10450]),
    epochs=st.integers(1, 700),
    batch=st.integers(1, 1024),
)
def test_units_cover_every_position_once_and_never_cut_a_batch(count, classes, epochs, batch):
    units = plan_units(count, classes, RelabelOptions(epochs=epochs, batch=batch))
    assert len({u.id for u in units}) == len(units)
    seen: dict[int, int] = {}
    for unit in units:
        assert unit.num_rows <= max(batch, min(MAX_SHARD_ROWS, MAX_SHARD_LOGITS // classes)) + batch
        assert unit.position_start % batch == 0
        assert unit.position_stop % batch == 0 or unit.position_stop == count
        whole = unit.position_start == 0 and unit.position_stop == count
        assert whole or unit.epoch_stop == unit.epoch_start + 1
        for epoch in range(unit.epoch_start, unit.epoch_stop):
            assert seen.get(epoch, 0) == unit.position_start
            seen[epoch] = unit.position_stop
    assert seen == dict.fromkeys(range(epochs), count)


@pytest.mark.parametrize(("count", "epochs"), [(70, 40), (20000, 2)])
def test_round_trip(tmp_path, count, epochs):
    options = RelabelOptions(epochs=epochs, batch=50)
    logits = write_all(str(tmp_path), count, options)
    assert len(list(tmp_path.iterdir())) > 1
    reader = LabelReader(str(tmp_path))
    for epoch in {0, 1, epochs - 1}:
        found, drawn = reader.read_epoch(epoch), draw_views(0, epoch, count, SIZE, options)
        for name, values in vars(drawn).items():
            again = getattr(found.views, name)
            assert np.array_equal(values, again), name
            assert values.dtype == again.dtype
        assert found.logits.dtype == np.float16
        assert np.array_equal(found.logits, logits[epoch])


def test_reading_an_epoch_opens_its_shards_alone(tmp_path):
    options = RelabelOptions(epochs=40, batch=50)
    write_all(str(tmp_path), 70, options)
    reader = LabelReader(str(tmp_path))
    for path in tmp_path.glob("labels-*"):
        if not path.name.startswith("labels-00003"):
            path.write_bytes(b"broken")
    reader.read_epoch(3)
    with pytest.raises(RunError, match=r"labels-00006-0000000.parquet: not a readable label shard; delete it"):
        reader.read_epoch(6)


@pytest.mark.parametrize("ahead", [False, True])
def test_one_shard_of_logits_is_held_and_each_is_read_once(tmp_path, monkeypatch, ahead):
    """Of four shards an epoch, and with reading ahead one more."""
    count, options, read = 30000, RelabelOptions(epochs=2, batch=50), []
    logits = write_all(str(tmp_path), count, options)
    alive: list[weakref.ref[np.ndarray]] = []
    real = shards.read_array

    class Watched(np.ndarray):
        """Plain arrays have no place for weak references."""

    def watching(uri, column):
        read.append(uri.rsplit("/", 1)[1])
        found = real(uri, column).view(Watched)
        alive.append(weakref.ref(found))
        assert sum(held() is not None for held in alive) <= 1 + ahead
        return found

    monkeypatch.setattr(shards, "read_array", watching)
    with ThreadPoolExecutor(1) as pool:
        reader = LabelReader(str(tmp_path), pool=pool if ahead else None)
        for epoch in range(2):
            labels = reader.read_epoch(epoch)
            for start in range(0, count, 70):
                positions = np.arange(start, min(start + 70, count))[::-1]
                assert np.array_equal(labels.logits[positions], logits[epoch][positions])
    assert read == sorted(p.name for p in tmp_path.iterdir())
    assert len(read) == 8


@pytest.mark.s3
def test_shards_are_read_in_few_large_requests(s3_server, monkeypatch):
    uri, options = f"{s3_server}/{uuid.uuid4().hex}", RelabelOptions(epochs=1, batch=50)
    logits = write_all(uri, 2000, options, classes=500)
    requests: list[int] = []
    real = s3fs.core.S3File._fetch_range

    def counting(self, start, end):
        requests.append(end - start)
        return real(self, start, end)

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counting)
    reader = LabelReader(uri)
    requests.clear()
    labels = reader.read_epoch(0)
    assert len(requests) == 2  # the footer and all views
    assert sum(requests) < 300_000
    assert np.array_equal(labels.logits[:10], logits[0, :10])
    assert len(requests) == 4  # the footer and all logits
    assert np.array_equal(labels.logits[10:], logits[0, 10:])
    assert len(requests) == 4


def test_damaged_logits_are_named_when_they_are_asked_for(tmp_path):
    write_all(str(tmp_path), 20000, RelabelOptions(epochs=1, batch=50))
    path = sorted(tmp_path.iterdir())[1]
    content = bytearray(path.read_bytes())
    group = pq.read_metadata(path).row_group(0)
    column = group.column(group.num_columns - 1)
    assert column.path_in_schema.startswith("logits")
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    labels = LabelReader(str(tmp_path)).read_epoch(0)
    labels.logits[:50]
    with pytest.raises(RunError, match=rf"{path.name}: not a readable label shard; delete it and run again"):
        labels.logits[10000:10050]


def test_any_parquet_reader_sees_the_columns(tmp_path):
    options = RelabelOptions(epochs=1, batch=30)
    (unit,) = plan_units(70, 10, options)
    logits = write(str(tmp_path), unit, options)
    table = pq.read_table(tmp_path / f"{unit.id}.parquet")
    assert table.schema.field("logits").type == pa.list_(pa.float16(), 10)
    assert table.schema.field("crop").type == pa.list_(pa.float32(), 4)
    assert table.schema.field("mix_box").type == pa.list_(pa.float32(), 4)
    kinds = {f.name: str(f.type) for f in table.schema if not pa.types.is_fixed_size_list(f.type)}
    assert kinds == {
        "epoch": "int32", "position": "int32", "batch": "int32", "image_id": "int64", "flip": "bool",
        "mix_partner": "int64", "mix_lambda": "float",
    }  # fmt: skip
    rows = table.to_pylist()
    assert [r["batch"] for r in rows] == [0] * 30 + [1] * 30 + [2] * 10
    assert [r["position"] for r in rows] == list(range(70))
    drawn = draw_views(0, 0, 70, SIZE, options)
    for position in (0, 33, 69):
        row, k = rows[position], drawn.order[position]
        assert row["image_id"] == k
        assert row["crop"] == drawn.crop[k].tolist()
        assert (row["flip"], row["mix_partner"]) == (drawn.flip[k], drawn.partner[k])
        assert row["mix_box"] == drawn.box[k].tolist()
        assert np.array_equal(np.array(row["logits"], np.float16), logits[position])
    assert json.loads(table.schema.metadata[b"prism"])["unit"] == unit.id


@pytest.mark.parametrize(("count", "classes", "epochs"), [(1000, 1000, 3), (100, 10, 300)])
def test_size_estimate(tmp_path, count, classes, epochs):
    options = RelabelOptions(epochs=epochs, batch=50)
    write_all(str(tmp_path), count, options, classes=classes)
    real = sum(os.path.getsize(p) for p in tmp_path.iterdir())
    assert label_bytes(count, classes, epochs) == pytest.approx(real, rel=0.1)


def test_missing_shard_is_named_incomplete(tmp_path):
    options = RelabelOptions(epochs=2, batch=50)
    write_all(str(tmp_path), 20000, options)
    (tmp_path / sorted(p.name for p in tmp_path.iterdir())[1]).unlink()
    reader = LabelReader(str(tmp_path))
    with pytest.raises(RunError, match=r"labels of epoch 0 are incomplete \(\d+ of 20000\); run the relabel"):
        reader.read_epoch(0)
    reader.read_epoch(1)
    with pytest.raises(RunError, match=r"epoch 2 are incomplete \(0 of"):
        reader.read_epoch(2)


def test_foreign_shards_are_refused(tmp_path):
    options = RelabelOptions(epochs=40, batch=50)
    units = plan_units(70, 10, options)
    write_all(str(tmp_path), 70, options)
    write(str(tmp_path), units[1], options, identity="another")
    with pytest.raises(RunError, match="belongs to another run"):
        LabelReader(str(tmp_path)).read_epoch(units[1].epoch_start)


def test_other_classes_are_refused(tmp_path):
    options = RelabelOptions(epochs=1)
    write_all(str(tmp_path), 70, options)
    names = tuple(f"class {k}" for k in range(10))
    LabelReader(str(tmp_path), DataSpec(SIZE, 1, (0.5,), (0.2,), names))
    with pytest.raises(RunError, match="other classes, or in another order"):
        LabelReader(str(tmp_path), DataSpec(SIZE, 1, (0.5,), (0.2,), names[::-1]))


def test_empty_folder(tmp_path):
    with pytest.raises(RunError, match="no readable label shards; run the relabel stage again"):
        LabelReader(str(tmp_path / "nowhere"))
