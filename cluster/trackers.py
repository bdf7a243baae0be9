"""Experiment trackers that show the jobs of a search, through Tune's own callbacks for them.

They are the user's to install and to configure: MLflow by ``MLFLOW_TRACKING_URI``, Weights & Biases by ``wandb login``,
``WANDB_API_KEY`` or ``WANDB_MODE=offline``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from ray.tune import Callback

from cluster.errors import UserError


def make_trackers(names: Sequence[str], project: str, field: str) -> list[Callback]:
    """A callback for each tracker.

    Args:
        names: of the trackers, ``mlflow`` or ``wandb``.
        project: under which they show the jobs.
        field: names ``names`` in errors.

    Raises:
        UserError: one is not installed, or knows no account.
    """
    return [_tracker(name, project, field) for name in names]


def _tracker(name: str, project: str, field: str) -> Callback:
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{field}: {name} is not installed; `pip install {name}`, or take it out")
    if name == "mlflow":
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        return MLflowLoggerCallback(experiment_name=project)
    from ray.air.integrations.wandb import WandbLoggerCallback

    callback = WandbLoggerCallback(project=project)
    try:
        # Tune calls it too, but only when the teachers have been trained.
        callback.setup()
    except ValueError:
        raise UserError(
            f"{field}: wandb knows no account; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
        ) from None
    return callback
