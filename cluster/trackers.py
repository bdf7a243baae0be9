"""Experiment trackers that show the jobs of a search, through Tune's own callbacks for them.

They are the user's to install and to configure: MLflow by ``MLFLOW_TRACKING_URI``, Weights & Biases by ``wandb login``
or ``WANDB_API_KEY``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partialmethod
from typing import Any

from ray.tune import Callback

from cluster.errors import UserError, first_line, redact
from cluster.progress import console


class Tolerant(Callback):
    """A callback that may fail: a tracker out of reach is no reason to end a search.

    Args:
        name: for the warning, given once; then it hears of nothing any more.
        inner: the callback.
    """

    def __init__(self, name: str, inner: Callback):
        self.name = name
        self._inner: Callback | None = inner

    def _pass(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self._inner is None:
            return
        try:
            getattr(self._inner, method)(*args, **kwargs)
        except Exception as error:
            self._inner = None
            words = redact(first_line(error))
            console.print(f"warning: {self.name} failed and is told nothing more ({words})", style="yellow")

    setup = partialmethod(_pass, "setup")
    on_trial_start = partialmethod(_pass, "on_trial_start")
    on_trial_result = partialmethod(_pass, "on_trial_result")
    on_trial_complete = partialmethod(_pass, "on_trial_complete")
    on_trial_error = partialmethod(_pass, "on_trial_error")
    on_experiment_end = partialmethod(_pass, "on_experiment_end")

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a copy of its settings with every experiment; nobody reads it.
        return {"name": self.name, "_inner": None}


def make_trackers(names: Sequence[str], project: str, field: str, *, reach: bool = True) -> list[Callback]:
    """A callback for each tracker.

    Args:
        names: of the trackers, ``mlflow`` or ``wandb``.
        project: under which they show the jobs.
        field: names ``names`` in errors.
        reach: see whether they answer, which makes MLflow open the experiment.

    Raises:
        UserError: one is not installed, knows no account, or is out of reach.
    """
    return [Tolerant(name, _tracker(name, project, field, reach)) for name in names]


def _tracker(name: str, project: str, field: str, reach: bool) -> Callback:
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{field}: {name} is not installed; `pip install {name}`, or take it out")
    found: Any
    if name == "mlflow":
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        found, remedy = MLflowLoggerCallback(experiment_name=project), "check MLFLOW_TRACKING_URI"
    else:
        from ray.air.integrations.wandb import WandbLoggerCallback

        found, remedy = WandbLoggerCallback(project=project), "run `wandb login`, or set WANDB_API_KEY"
    if reach:
        try:
            # Tune does it too, but only when the teachers have been trained.
            found.setup()
        except Exception as error:
            raise UserError(f"{field}: {name} cannot be used ({redact(first_line(error))}); {remedy}") from None
    return found
