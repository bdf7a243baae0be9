"""Which units are committed, known from one listing a folder instead of one request a shard.

What a stage reports of each finished unit, its content key and the sizes of its shards, is kept by the driver in
segments, ``RECORDS/SEGMENT.parquet``. A unit is committed when its record has the wanted key and every one of its
shards is listed with the recorded size. Only shards without such a record, those of the last seconds before a driver
died, are opened.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from cluster import shards, storage
from cluster.errors import UserError

# A driver that dies forgets at most so much; what it forgot costs a request a shard.
FLUSH_RECORDS = 500
FLUSH_S = 20.0
# More segments than this are merged into one when they are read: each is a request.
MAX_SEGMENTS = 32
SCHEMA = pa.schema([("unit", pa.string()), ("key", pa.string()), ("sizes", pa.list_(pa.int64()))])

Record = tuple[str, list[int]]


def content_key(*content: Any) -> str:
    """Short digest of plain values; equal values have equal keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Ledger:
    """Records of the units whose shards lie in certain folders.

    Use it as a context manager around the work, so that the last records are kept.

    Args:
        records_uri: folder of the segments.
        folders: each unit has ``UNIT.parquet`` in every one of them.
    """

    def __init__(self, records_uri: str, folders: Sequence[str]):
        self._records_uri, self._folders = records_uri, list(folders)
        self._segment: dict[str, Record] = {}
        self._dirty = False
        self._number: int | None = None
        self._flushed = time.monotonic()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.flush()

    def committed(self, wanted: Mapping[str, str], verify: Callable[[str], bool]) -> set[str]:
        """Units of ``wanted`` that need not be done again.

        Args:
            wanted: unit → content key.
            verify: opens the shards of a unit that has no record; whether they are whole and of the wanted content.
        """
        listed = [
            {name.removesuffix(".parquet"): size for name, size in storage.list_files(folder, ".parquet").items()}
            for folder in self._folders
        ]
        there = [unit for unit in wanted if all(unit in sizes for sizes in listed)]
        records = self._read()

        def sizes_of(unit: str) -> list[int]:
            return [sizes[unit] for sizes in listed]

        done = {unit for unit in there if records.get(unit) == (wanted[unit], sizes_of(unit))}
        unknown = [unit for unit in there if unit not in done]
        with ThreadPoolExecutor(shards.READERS) as pool:
            found = [unit for unit, good in zip(unknown, pool.map(verify, unknown), strict=True) if good]
        for unit in found:
            self.add(unit, wanted[unit], sizes_of(unit))
        for unit in records.keys() & wanted.keys() - done - set(found):
            # What is made now may have the size of what was there, and the driver may die before it can record it.
            self.add(unit, "", [])
        return done | set(found)

    def add(self, unit: str, key: str, sizes: Sequence[int]) -> None:
        """Record a committed unit: its content key, and the size of its shard in every folder, bytes."""
        self._segment[unit] = key, list(sizes)
        self._dirty = True
        if len(self._segment) >= FLUSH_RECORDS or time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write the segment that records are added to until it is full: slow units do not make a file each."""
        if self._dirty:
            self._write(self._segment)
            self._dirty = False
            if len(self._segment) >= FLUSH_RECORDS:
                self._segment, self._number = {}, self._following()
        self._flushed = time.monotonic()

    def _write(self, records: Mapping[str, Record]) -> None:
        keys, sizes = zip(*records.values(), strict=True)
        table = pa.table([list(records), list(keys), list(sizes)], schema=SCHEMA)
        if self._number is None:
            self._number = self._after(self._segments())
        shards.write_shard(storage.join(self._records_uri, f"{self._number:06d}.parquet"), table, compression="zstd")

    def _following(self) -> int:
        assert self._number is not None, "a segment was written"
        return self._number + 1

    def _segments(self) -> list[str]:
        return list(storage.list_files(self._records_uri, ".parquet"))

    @staticmethod
    def _after(names: list[str]) -> int:
        return 1 + max((int(name.removesuffix(".parquet")) for name in names), default=-1)

    def _read(self) -> dict[str, Record]:
        """All records; of a unit that has several, the last."""
        names = self._segments()
        self._number = self._after(names)

        def read(name: str) -> pa.Table:
            try:
                return shards.read_shard(storage.join(self._records_uri, name))
            except UserError:
                # Damaged: its units are verified by their shards.
                return SCHEMA.empty_table()

        with ThreadPoolExecutor(shards.READERS) as pool:
            tables = list(pool.map(read, names))
        records: dict[str, Record] = {}
        for table in tables:
            columns = (table[name].to_pylist() for name in ("unit", "key", "sizes"))
            records |= {unit: (key, sizes) for unit, key, sizes in zip(*columns, strict=True)}
        if len(names) > MAX_SEGMENTS:
            self._write(records)
            self._number = self._following()
            storage.remove_files(self._records_uri, names)
        return records
