"""The probe of ``stages.recover.occupancy`` as a stage, for a run's own GPUs."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import replace

import torch

from cluster import storage
from cluster.attempts import Attempts
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row
from stages.data import DataSpec
from stages.device import pick_device
from stages.recover.occupancy import compare, fastest, sharings
from stages.recover.options import RecoverOptions
from stages.recover.timing import TimedStep
from stages.recover.unit import RecoverUnit
from stages.teachers.options import TeacherSpec


class ProbeStage:
    """Finds out how many units at the same time its worker's GPU recovers fastest.

    Args:
        teachers: at least those that units name; no weights are read.
        data: image space.
        options: of recovery.
        most: no more workers than these.
    """

    def __init__(self, teachers: Mapping[str, TeacherSpec], data: DataSpec, options: RecoverOptions, most: int):
        self.teachers, self.data, self.options, self.most = teachers, data, options, most

    def __call__(self, row: Row) -> Row:
        """Measure with the row's unit.

        Returns:
            ``id``, ``error``, ``workers`` and ``rates``: image-steps a second of all workers together for 1, 2 and 4 of
            them, NaN where they do not fit into the memory.

        Raises:
            PrismError: see ``probe``.
        """
        unit = RecoverUnit.model_validate_json(row["unit"])
        device = pick_device(True)
        threads = torch.get_num_threads()
        among = [replace(each, threads=threads) for each in sharings(device, 1) if each.workers <= self.most]
        tried = compare(unit, self.teachers, self.data, self.options, device, among, self._steps(unit, device))
        best = fastest(tried)
        return {
            "id": row["id"],
            "error": "",
            # Where not even one fits, the unit itself says so.
            "workers": best[0].workers if best else 1,
            "rates": [math.nan if rate is None else rate for rate in tried.values()],
        }

    def _steps(self, unit: RecoverUnit, device: torch.device) -> int:
        """Of a turn. The memory that this takes is free again before the workers come."""
        step = TimedStep(unit, self.teachers, self.data, self.options, device)
        # The first loads kernels, and compiles.
        step.ours(1)
        return step.turn()


def probe_stage(
    out: str,
    teachers: Mapping[str, TeacherSpec],
    data: DataSpec,
    options: RecoverOptions,
    most: int,
    threads: int,
) -> ActorStage:
    """The stage for a runner: one worker, with a whole GPU.

    Args:
        out: run directory; its ``progress/probe`` bounds how often the worker may be lost.
        teachers: of the run.
        data: image space.
        options: of recovery.
        most: no more units at the same time than these.
        threads: of torch in recovery's actors.
    """
    return ActorStage(
        name="probe",
        factory=ProbeStage,
        kwargs={"teachers": dict(teachers), "data": data, "options": options, "most": most},
        resources=ActorResources(gpus=1, actors=1, threads=threads),
        attempts=Attempts(storage.join(out, "progress", "probe"), uuid.uuid4().hex, "leave resources.probe out"),
    )
