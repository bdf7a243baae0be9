"""Experiment trackers: refused before any work where they cannot be used, and no reason to end a search."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
from ray.tune import Callback
from rich.console import Console

from cluster import trackers
from cluster.errors import UserError
from cluster.trackers import Tolerant, make_trackers


class Broken(Callback):
    """Works once."""

    def __init__(self, **options: Any):
        self.options, self.heard = options, 0

    def setup(self, **info: Any) -> None:
        raise ValueError("No API key found.\nSet one.")

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.heard += 1
        if self.heard > 1:
            raise ConnectionError("https://user:secret@tracker is gone")


def test_a_tracker_that_fails_is_told_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(trackers, "console", Console(file=shown, width=200))
    inner = Broken()
    tolerant = Tolerant("mlflow", inner)
    for iteration in range(4):
        tolerant.on_trial_result(iteration=iteration, trials=[], trial=None, result={})
    assert inner.heard == 2
    assert shown.getvalue().count("warning: mlflow failed and is told nothing more") == 1
    assert "secret" not in shown.getvalue()
    # Tune writes it down with its settings.
    pickle.loads(pickle.dumps(tolerant)).on_trial_result(iteration=0, trials=[], trial=None, result={})


@pytest.mark.parametrize(
    ("name", "module", "remedy"),
    [
        ("mlflow", "mlflow.MLflowLoggerCallback", "check MLFLOW_TRACKING_URI"),
        ("wandb", "wandb.WandbLoggerCallback", "run `wandb login`, or set WANDB_API_KEY"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, remedy: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: wanted)
    monkeypatch.setattr(f"ray.air.integrations.{module}", Broken)
    with pytest.raises(UserError, match=f"search.trackers: {name} cannot be used .No API key found.*; {remedy}$"):
        make_trackers([name], "run", "search.trackers")
    assert len(make_trackers([name], "run", "search.trackers", reach=False)) == 1
