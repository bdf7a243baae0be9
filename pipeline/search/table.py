"""``search/trials.parquet``: one row per trial, readable without this package."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import UserError
from pipeline.search.trial import Measured, Trial

TRIALS_FILE = "search/trials.parquet"

RUNG = pa.struct(
    [
        ("top1", pa.float64()),
        ("top1_seeds", pa.list_(pa.float64())),
        ("gpu_seconds", pa.float64()),
        ("seconds", pa.float64()),
        ("units", pa.int64()),
        ("units_shared", pa.int64()),
    ]
)
# Columns before those of the searched fields, and after them.
FIRST = [
    ("number", pa.int64()),
    ("state", pa.string()),
    ("reason", pa.string()),
    ("objective", pa.float64()),
    ("gpu_seconds", pa.float64()),
    ("seconds", pa.float64()),
    ("rungs", pa.list_(RUNG)),
]
LAST = ("params", "point")


def write_trials(uri: str, trials: Sequence[Trial]) -> None:
    """Write trials as one Parquet file, in one step.

    Columns: ``number``, ``state``, ``reason``; ``objective`` and ``gpu_seconds`` = top-1 and planned GPU-seconds of the
    last measured rung, ``seconds`` = sum over rungs, each null where none was measured; ``rungs`` = all of
    ``Measured``, one entry per rung. Then one column per searched field, named by its path and typed by its values
    (null where it is inactive, list<string> for teachers, JSON where values are of several types). ``params`` and
    ``point`` are JSON texts of what was suggested and of the fields' values as they were.

    All columns are a function of (configuration, seed, data), except ``seconds``, and in ``rungs`` ``seconds`` and
    ``units_shared``, which tell how fast the machines were and what earlier searches had left there. (The ``reason``
    of a trial that a machine failed is that machine's.)

    Args:
        uri: of the file, local or ``s3://``.
        trials: with plain values, as from YAML or JSON, in ``params`` and ``point``.
    """
    rows = [_first(trial) for trial in trials]
    arrays = [pa.array([row[name] for row in rows], kind) for name, kind in FIRST]
    fields = list(dict.fromkeys(field for trial in trials for field in trial.point))
    arrays += [_column([trial.point.get(field) for trial in trials]) for field in fields]
    arrays += [pa.array([json.dumps(getattr(trial, name)) for trial in trials], pa.string()) for name in LAST]
    table = pa.Table.from_arrays(arrays, names=[name for name, _ in FIRST] + fields + list(LAST))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.write_bytes(uri, sink.getvalue())


def read_trials(uri: str) -> list[Trial]:
    """The trials that ``write_trials`` wrote, in its order.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not a table of trials.
    """
    data = storage.read_bytes(uri)
    try:
        rows = pq.read_table(io.BytesIO(data), columns=["number", "state", "reason", "rungs", *LAST]).to_pylist()
        return [
            Trial(
                number=row["number"],
                state=row["state"],
                reason=row["reason"],
                rungs=[Measured(**rung) for rung in row["rungs"]],
                **{name: json.loads(row[name]) for name in LAST},
            )
            for row in rows
        ]
    except (pa.ArrowException, KeyError, TypeError, ValueError):
        raise UserError(f"{uri} is not a table of trials; delete it and run the search again") from None


def _first(trial: Trial) -> dict[str, Any]:
    last = trial.rungs[-1] if trial.rungs else None
    return {
        "number": trial.number,
        "state": trial.state,
        "reason": trial.reason,
        "objective": last and last.top1,
        "gpu_seconds": last and last.gpu_seconds,
        "seconds": sum(rung.seconds for rung in trial.rungs) if last else None,
        "rungs": [rung.model_dump() for rung in trial.rungs],
    }


def _column(values: list[Any]) -> pa.Array:
    """Values of one field, by their common type; JSON texts where they have none."""
    kind = _kind(value for value in values if value is not None)
    if kind is not None:
        try:
            return pa.array(values, kind)
        except (pa.ArrowException, OverflowError, ValueError):
            pass  # A whole number that 64 bits do not hold, or text that is not Unicode.
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())


def _kind(values: Iterable[Any]) -> pa.DataType | None:
    found = list(values)
    if found and all(isinstance(value, list) for value in found):
        inner = _kind(item for value in found for item in value)
        return None if inner is None or pa.types.is_list(inner) else pa.list_(inner)
    kinds = {type(value) for value in found}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    if kinds in ({float}, {int, float}):
        return pa.float64()
    return pa.string() if kinds <= {str} else None
