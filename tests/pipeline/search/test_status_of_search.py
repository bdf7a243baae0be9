"""What ``prism status`` says of a search, from its directory alone."""

from __future__ import annotations

import json

import made_up
import pytest

from cluster import storage
from cluster.lease import Lease
from pipeline.loading import load_config
from pipeline.rundir import claim
from pipeline.search.trial import PREPARED, full_run

TRIALS = made_up.trials()
BEST = max((t for t in TRIALS if t.state == "finished"), key=lambda t: t.rungs[-1].top1)


def counted(trials) -> str:
    reached = [sum(len(trial.rungs) > rung for trial in trials) for rung in range(3)]
    return f"measured: {reached[0]} at rung 1, {reached[1]} at rung 2, {reached[2]} at rung 3"


@pytest.fixture
def out(tmp_path) -> str:
    return str(tmp_path / "search")


def test_a_search_that_trains_its_teachers(prism, tiny_config, out):
    made_up.write(out, None)
    base = storage.join(out, "search", PREPARED)
    claim(load_config(str(tiny_config(out=base))), {})
    with Lease(storage.join(out, "search")):
        code, text, err = prism("status", out)
    assert code == 0, err
    lines = text.splitlines()
    assert lines[0] == f"pools for <CIFAR-10> at {out}: search, running"
    assert lines[1].startswith("driver     process ")
    assert lines[2] == f"trials     0/24 ended; {counted([])}"
    assert lines[4] == f"run (prism) at {base}: stopped"
    assert "squeeze    0/2 teachers" in lines


def test_a_search_that_was_killed_among_its_trials(prism, out):
    """One more trial was still being measured."""
    made_up.write(out, [*TRIALS[:23], TRIALS[23].model_copy(update={"state": "running"})])
    code, text, err = prism("status", out)
    assert code == 0, err
    lines = text.splitlines()
    assert lines[:2] == [
        f"pools for <CIFAR-10> at {out}: search, stopped",
        "driver     none; run the same command again to go on",
    ]
    assert lines[2] == f"trials     23/24 ended; {counted(TRIALS)}, 2 failed"
    assert lines[3].startswith(f"best       trial {BEST.number}: {BEST.rungs[-1].top1:.2f} % (recover.r_bn = ")
    assert lines[4].startswith(f"default    trial 0: {TRIALS[0].rungs[-1].top1:.2f} % (recover.r_bn = 0.01, ")
    assert len(lines) == 5

    code, text, err = prism("status", out, "--json", "--watch")
    assert code == 0, err
    found = json.loads(text)
    assert (found["state"], found["planned"], found["ended"], found["failed"]) == ("stopped", 24, 23, 2)
    assert found["best"]["point"] == BEST.point


def test_full_runs_are_shown_until_they_are_done(prism, tiny_config, out):
    made_up.write(out, TRIALS)
    won = storage.join(out, "search", *full_run(BEST.number).split("/"))
    claim(load_config(str(tiny_config(out=won))), {})
    code, text, err = prism("status", out)
    assert code == 0, err
    assert f"run (prism) at {won}: stopped" in text.splitlines()
    final = storage.join(out, "search", "final.json")
    # Of a shorter search, with another winner.
    storage.write_json(final, {**made_up.FINAL, "winner": {**made_up.FINAL["winner"], "number": BEST.number + 1}})
    assert prism("status", out)[1].splitlines()[0].endswith(": search, stopped")
    storage.write_json(final, {**made_up.FINAL, "winner": {**made_up.FINAL["winner"], "number": BEST.number}})
    assert prism("status", out)[1].splitlines()[0].endswith(": search, finished")


def test_a_directory_may_hold_a_run_too(prism, tiny_config, out):
    made_up.write(out, TRIALS)
    claim(load_config(str(tiny_config(out=out))), {})
    code, text, err = prism("status", out)
    assert code == 0, err
    assert f"pools for <CIFAR-10> at {out}: search, stopped" in text.splitlines()
    assert f"run (prism) at {out}: stopped" in text.splitlines()
