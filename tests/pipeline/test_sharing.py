"""How many units share a GPU: never at the cost of results or of the run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import RunError
from cluster.resources import ActorResources
from pipeline import sharing
from pipeline.context import Run
from pipeline.loading import load_config
from pipeline.run import execute
from pipeline.sharing import recover_resources
from stages.recover.options import RecoverOptions


class Fake:
    """A run whose probe answers with these rows; keeps what it asked for."""

    def __init__(self, out: Any, *answers: dict[str, Any], serial: bool = False, probe: bool = True):
        self.config = SimpleNamespace(
            recover=RecoverOptions(logit_teachers=["a"], bn_teachers=["a"]),
            resources=SimpleNamespace(recover=ActorResources(threads=3), probe=probe),
        )
        self.out, self.serial = str(out), serial
        self.teachers, self.ready = {"a": None}, SimpleNamespace(data=None)
        self.asked: list[int] = []
        self._answers = answers

    def runner(self, rows: Any, stages: Any) -> Any:
        ((row,), (stage,)) = rows, stages
        self.asked.append(stage.kwargs["most"])
        assert stage.resources == ActorResources(gpus=1, actors=1, threads=3)
        stage.attempts.begin(row["id"], 1)
        yield from ({"id": row["id"], "error": "", "rates": [1.0]} | answer for answer in self._answers)


@pytest.fixture(autouse=True)
def capacity(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Of the cluster."""
    found = SimpleNamespace(gpus=2.0, memory=math.inf)
    monkeypatch.setattr(sharing, "read_capacity", lambda: found)
    return found


def rows(count: int) -> Any:
    return [{"id": f"u{index}", "error": "", "unit": ""} for index in range(count)]


def test_a_share_for_each_of_those_that_are_fastest(tmp_path, capsys):
    run = Fake(tmp_path, {"workers": 2, "rates": [10.0, 30.0, math.nan]})
    assert recover_resources(run, rows(9)) == ActorResources(gpus=0.5, threads=3)
    assert run.asked == [4]
    assert "2 at the same time (1, 2, 4 make 10, 30, out of memory image-steps/s" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))


def test_no_more_than_there_are_units_and_memory_for(tmp_path, capacity):
    capacity.memory = 13 * 2**30
    run = Fake(tmp_path, {"workers": 2})
    recover_resources(run, rows(9))
    assert run.asked == [2]


def test_nobody_asks_where_there_is_nothing_to_share(tmp_path, capacity):
    nothing = [(Fake(tmp_path, serial=True), 9), (Fake(tmp_path, probe=False), 9), (Fake(tmp_path), 0)]
    for run, count in [*nothing, (Fake(tmp_path), 3)]:
        assert recover_resources(run, rows(count)) is run.config.resources.recover
        assert run.asked == []
    capacity.gpus = 0.0
    assert recover_resources(Fake(tmp_path), rows(9)).gpus is None


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([], "1 of 1 got lost"),
        ([{"error": "probe: a worker of the probe failed ([/kaput])"}], "resources.probe: probe: a worker of the"),
    ],
)
def test_a_probe_that_fails_costs_no_run(tmp_path, capsys, answers, words):
    assert recover_resources(Fake(tmp_path, *answers), rows(9)).gpus == 1
    shown = capsys.readouterr().out
    assert words in shown
    assert "every GPU has one unit at a time" in shown


@pytest.mark.parametrize(("error", "passes"), [(RunError("no progress"), False), (KeyboardInterrupt(), True)])
def test_a_probe_that_is_stopped(tmp_path, error, passes):
    run = Fake(tmp_path)

    def stop(*args: Any) -> Any:
        raise error

    run.runner = stop
    if passes:
        with pytest.raises(KeyboardInterrupt):
            recover_resources(run, rows(9))
    else:
        assert recover_resources(run, rows(9)).gpus == 1


def test_what_does_not_go_together(prism, tiny_config):
    for words, shown in (
        ({"recover": {"gpus": 0.5, "actors": 3}}, "probe does not go with recover.gpus and recover.actors; leave"),
        ({"placement": "per_teacher"}, "probe does not go with placement; leave"),
    ):
        code, _, err = prism("plan", tiny_config(resources=words | {"probe": True}))
        assert code == 2
        assert shown in " ".join(err.split())


def test_it_is_no_part_of_what_a_run_is(tiny_config):
    one, other = (load_config(str(tiny_config(resources={"probe": probe}))) for probe in (False, True))
    assert one.sha256() == other.sha256()


def test_recovery_has_what_was_found(tiny_config, monkeypatch):
    config = load_config(str(tiny_config()))
    execute(config, ["squeeze"], serial=True)
    found: list[ActorResources] = []
    shared = ActorResources(gpus=0.25, threads=1)
    monkeypatch.setattr("pipeline.steps.recover_resources", lambda run, rows: shared if len(rows) == 2 else None)
    monkeypatch.setattr(Run, "drive", lambda run, title, rows, stages, *args: found.append(stages[0].resources))
    execute(config, ["recover"], serial=True)
    assert found == [shared]


@pytest.mark.ray
@pytest.mark.slow
def test_units_share_what_stands_for_a_gpu(prism, tiny_config, start_machines, monkeypatch):
    """On a cluster whose logical GPU no torch sees: the probe works in its actor, then units in shares of the GPU."""
    address, _ = start_machines((3, 1))
    path = tiny_config(
        recover={"ipc": 8, "iterations": 40},
        resources={name: {"gpus": 0} for name in ("squeeze", "relabel", "evaluate")} | {"probe": True},
    )
    words = [path, f"resources.session.address={address}"]
    assert prism("squeeze", *words)[0] == 0
    found: list[Any] = []
    real = sharing.recover_resources

    def measured(*args: Any) -> Any:
        found.append(real(*args))
        # As if two had been faster.
        return found[-1].model_copy(update={"gpus": 0.5})

    monkeypatch.setattr("pipeline.steps.recover_resources", measured)
    code, out, err = prism("recover", *words)
    assert code == 0, err
    assert "recover: 1 at the same time (1, 2, 4 make" in out + err
    assert [each.gpus for each in found] == [1]
    assert len(list((path.parent / "run" / "recovered").glob("*.parquet"))) == 8
