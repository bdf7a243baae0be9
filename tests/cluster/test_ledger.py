"""What is committed is known from listings and records; shards are opened only where there is no record."""

from __future__ import annotations

from pathlib import Path

import aiobotocore.client
import pyarrow as pa
import pytest

from cluster import ledger as ledger_module
from cluster import shards, storage
from cluster.ledger import Ledger, content_key

UNITS = [f"unit-{i:05d}" for i in range(6)]


def put(folder: str, unit: str, value: int = 0) -> int:
    table = pa.table({"value": [value] * 3}, schema=pa.schema([("value", pa.int64())]))
    return shards.write_shard(storage.join(folder, f"{unit}.parquet"), table)


def opened(calls: list[str], good: bool = True):
    def verify(unit: str) -> bool:
        calls.append(unit)
        return good

    return verify


@pytest.fixture
def run(tmp_path: Path):
    """Folders, records and wanted keys of six units, four of which were done and recorded."""
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    records = str(tmp_path / "records")
    with Ledger(records, folders) as ledger:
        for unit in UNITS[:4]:
            ledger.add(unit, content_key(unit), [put(folder, unit) for folder in folders])
    return records, folders, {unit: content_key(unit) for unit in UNITS}


def test_recorded_units_are_not_opened(run):
    records, folders, wanted = run
    calls: list[str] = []
    assert Ledger(records, folders).committed(wanted, opened(calls)) == set(UNITS[:4])
    assert calls == []


def test_a_missing_shard_in_any_folder_is_not_committed(run):
    records, folders, wanted = run
    storage.remove(storage.join(folders[1], f"{UNITS[0]}.parquet"))
    assert Ledger(records, folders).committed(wanted, opened([])) == set(UNITS[1:4])


def test_another_size_or_key_sends_to_the_shard_itself(run):
    records, folders, wanted = run
    path = Path(folders[0]) / f"{UNITS[0]}.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    wanted[UNITS[1]] = content_key("another seed")
    calls: list[str] = []
    found = Ledger(records, folders).committed(wanted, opened(calls, good=False))
    assert sorted(calls) == UNITS[:2]
    assert found == set(UNITS[2:4])


def test_units_without_a_record_are_opened_once(run):
    records, folders, wanted = run
    for folder in folders:
        put(folder, UNITS[4])
    calls: list[str] = []
    with Ledger(records, folders) as ledger:
        assert ledger.committed(wanted, opened(calls)) == set(UNITS[:5])
    assert calls == [UNITS[4]]
    calls.clear()
    assert Ledger(records, folders).committed(wanted, opened(calls)) == set(UNITS[:5])
    assert calls == []


def test_a_damaged_segment_costs_openings_not_units(run):
    records, folders, wanted = run
    (Path(records) / "000000.parquet").write_bytes(b"PAR1")
    calls: list[str] = []
    assert Ledger(records, folders).committed(wanted, opened(calls)) == set(UNITS[:4])
    assert sorted(calls) == UNITS[:4]


def test_segments_are_merged_and_later_records_win(run, monkeypatch):
    records, folders, wanted = run
    monkeypatch.setattr(ledger_module, "MAX_SEGMENTS", 3)
    for i in range(4):
        with Ledger(records, folders) as ledger:
            ledger.add(UNITS[0], content_key(UNITS[0], i), [put(folder, UNITS[0], i) for folder in folders])
    assert len(storage.list_files(records)) > 3
    wanted[UNITS[0]] = content_key(UNITS[0], 3)
    calls: list[str] = []
    for _ in range(2):
        assert Ledger(records, folders).committed(wanted, opened(calls)) == set(UNITS[:4])
        assert len(storage.list_files(records)) == 1
    assert calls == []


def test_what_is_made_again_is_not_taken_for_what_was_there(run):
    """Shards of the same size, a driver that dies before it records them, and a way back to the first settings."""
    records, folders, wanted = run
    other = wanted | {UNITS[0]: content_key("other threads")}
    with Ledger(records, folders) as ledger:
        assert UNITS[0] not in ledger.committed(other, opened([], good=False))
    for folder in folders:
        put(folder, UNITS[0], 7)
    calls: list[str] = []
    assert Ledger(records, folders).committed(wanted, opened(calls, good=False)) == set(UNITS[1:4])
    assert calls == [UNITS[0]]


def test_slow_units_do_not_make_a_segment_each(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "FLUSH_S", 0.0)
    records, folder = str(tmp_path / "records"), str(tmp_path / "shards")
    ledger = Ledger(records, [folder])
    wanted = {unit: content_key(unit) for unit in UNITS}
    for unit in UNITS:
        ledger.add(unit, wanted[unit], [put(folder, unit)])
        assert len(storage.list_files(records)) == 1
        calls: list[str] = []
        assert unit in Ledger(records, [folder]).committed(wanted, opened(calls))
        assert calls == []


def test_segments_are_written_while_work_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "FLUSH_RECORDS", 2)
    ledger = Ledger(str(tmp_path / "records"), [str(tmp_path)])
    for unit in UNITS[:5]:
        ledger.add(unit, "key", [1])
    assert len(storage.list_files(str(tmp_path / "records"))) == 2


def test_content_key_tells_values_apart():
    assert content_key({"a": 1, "b": 2}, "x") == content_key({"b": 2, "a": 1}, "x")
    assert content_key({"a": 1}, "x") != content_key({"a": 1}, "y")
    assert content_key({"a": 1}) != content_key({"a": 2})


@pytest.mark.s3
def test_a_resume_on_an_object_store_lists_and_opens_nothing(s3_server, monkeypatch):
    folder, records = f"{s3_server}/ledger/shards", f"{s3_server}/ledger/records"
    wanted = {f"unit-{i:05d}": content_key(i) for i in range(50)}
    with Ledger(records, [folder]) as ledger:
        for unit, key in wanted.items():
            storage.write_bytes(storage.join(folder, f"{unit}.parquet"), b"12345")
            ledger.add(unit, key, [5])
    seen: list[str] = []
    original = aiobotocore.client.AioBaseClient._make_api_call

    async def counted(self, operation, arguments):
        seen.append(operation)
        return await original(self, operation, arguments)

    monkeypatch.setattr(aiobotocore.client.AioBaseClient, "_make_api_call", counted)
    calls: list[str] = []
    assert Ledger(records, [folder]).committed(wanted, opened(calls)) == set(wanted)
    assert calls == []
    # A listing of shards and one of segments, and the read of a segment; not one call a shard.
    assert 3 <= len(seen) <= 8
