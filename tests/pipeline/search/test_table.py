"""The table of trials: what stands in it for others, and that nothing is lost for us."""

from __future__ import annotations

import json
import math

import made_up
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import storage
from cluster.errors import UserError
from pipeline.search.table import read_trials, write_trials
from pipeline.search.trial import Measured, Trial

NUMBER = st.floats(allow_nan=False, allow_infinity=False)
SCALAR = st.none() | st.booleans() | st.integers() | NUMBER | st.text()
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2))
FIELD = st.from_regex(r"[a-z_]{1,8}\.[a-z_]{1,8}", fullmatch=True)
COUNT = st.integers(0, 2**40)
RUNG = st.builds(Measured, top1=NUMBER, top1_seeds=st.lists(NUMBER, max_size=3), gpu_seconds=NUMBER, seconds=NUMBER,
                 units=COUNT, units_shared=COUNT)  # fmt: skip
# The sum of two may be infinite, which is not what is asked here.
RUNGS = st.lists(RUNG, max_size=3).filter(lambda rungs: math.isfinite(sum(rung.seconds for rung in rungs)))
TRIAL = st.builds(
    Trial,
    number=st.integers(0, 2**31),
    params=st.dictionaries(FIELD, SCALAR, max_size=4),
    point=st.dictionaries(FIELD, VALUE, max_size=4),
    rungs=RUNGS,
    state=st.sampled_from(["running", "finished", "stopped", "failed"]),
    reason=st.text(),
)


@settings(max_examples=60)
@given(st.lists(TRIAL, max_size=4))
def test_round_trip(tmp_path_factory, trials):
    where = str(tmp_path_factory.mktemp("t") / "trials.parquet")
    write_trials(where, trials)
    back = read_trials(where)
    assert back == trials
    # 1 and 1.0 and True are equal, but not the same setting.
    assert [t.model_dump_json() for t in back] == [t.model_dump_json() for t in trials]
    assert [list(t.point) for t in back] == [list(t.point) for t in trials]


def test_columns_by_hand(tmp_path):
    where = str(tmp_path / "trials.parquet")
    rungs = [
        Measured(top1=20.0, top1_seeds=[19.0, 21.0], gpu_seconds=30.0, seconds=2.5, units=4, units_shared=1),
        Measured(top1=35.5, top1_seeds=[35.5], gpu_seconds=90.0, seconds=7.0),
    ]
    write_trials(where, [
        Trial(number=0, params={}, point={"recover.r_bn": 1, "recover.bn_teachers": ["vgg"], "recover.flip": True,
                                          "recover.roll": 4, "evaluate.protocol.ema": None}, rungs=rungs,
              state="finished"),
        Trial(number=1, params={"recover.bn_teachers.vgg": False}, point={"recover.r_bn": 0.5, "relabel.mix": "a"},
              state="failed", reason="CUDA out of memory"),
        Trial(number=2, params={}, point={"relabel.mix": 3}, rungs=rungs[:1], state="stopped"),
    ])  # fmt: skip
    table = pq.read_table(where)
    assert table.column_names == [
        "number", "state", "reason", "objective", "gpu_seconds", "seconds", "rungs", "recover.r_bn",
        "recover.bn_teachers", "recover.flip", "recover.roll", "evaluate.protocol.ema", "relabel.mix", "params",
        "point",
    ]  # fmt: skip
    assert table["objective"].to_pylist() == [35.5, None, 20.0]
    assert table["gpu_seconds"].to_pylist() == [90.0, None, 30.0]
    assert table["seconds"].to_pylist() == [9.5, None, 2.5]
    assert table["rungs"].to_pylist()[0] == [rung.model_dump() for rung in rungs]
    assert table["rungs"].to_pylist()[1] == []
    assert table.schema.field("recover.r_bn").type == pa.float64()
    assert table["recover.r_bn"].to_pylist() == [1.0, 0.5, None]
    assert table.schema.field("recover.bn_teachers").type == pa.list_(pa.string())
    assert table["recover.bn_teachers"].to_pylist() == [["vgg"], None, None]
    assert table["recover.flip"].to_pylist() == [True, None, None]
    assert table.schema.field("recover.roll").type == pa.int64()
    assert table["relabel.mix"].to_pylist() == [None, '"a"', "3"], "of two types: JSON"
    assert json.loads(table["params"][1].as_py()) == {"recover.bn_teachers.vgg": False}
    # And by someone who has pandas and nothing of ours.
    frame = pd.read_parquet(where)
    assert frame.loc[frame.state == "stopped", "objective"].tolist() == [20.0]


def test_same_trials_same_bytes_and_nothing_beside_them(tmp_path):
    trials = made_up.trials()
    write_trials(str(tmp_path / "a.parquet"), trials)
    write_trials(str(tmp_path / "b.parquet"), trials)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    write_trials(str(tmp_path / "a.parquet"), trials[:3])
    assert read_trials(str(tmp_path / "a.parquet")) == trials[:3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_damaged_and_missing(tmp_path):
    where = str(tmp_path / "trials.parquet")
    with pytest.raises(FileNotFoundError):
        read_trials(where)
    storage.write_bytes(where, b"PAR1")
    with pytest.raises(UserError, match=r"is not a table of trials; delete it"):
        read_trials(where)
    pq.write_table(pa.table({"number": [1]}), where)
    with pytest.raises(UserError, match="is not a table of trials"):
        read_trials(where)


@pytest.mark.s3
def test_on_s3(s3_server):
    write_trials(f"{s3_server}/search/trials.parquet", made_up.trials())
    assert read_trials(f"{s3_server}/search/trials.parquet") == made_up.trials()
