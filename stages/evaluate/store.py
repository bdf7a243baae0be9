"""Where students live in the run directory, and what says that one is trained or evaluated.

``eval/weights/JOB/epoch-EEEEE.safetensors`` after every validated epoch, ``state.pt`` to go on from,
``trained.json`` once it is trained; ``eval/JOB.json`` is the result.
"""

from __future__ import annotations

import io
import json
from typing import Any

import torch
from torch import Tensor

from cluster import storage
from stages.evaluate.jobs import StudentJob
from stages.teachers.weights import load_state, save_weights


class StudentStore:
    """Files of one job under a run directory.

    Args:
        out_uri: the run directory.
        job: whose.
    """

    def __init__(self, out_uri: str, job: StudentJob):
        self.job = job
        self.folder = storage.join(out_uri, "eval", "weights", job.id)
        self.result_uri = storage.join(out_uri, "eval", f"{job.id}.json")

    def weights_uri(self, epoch: int) -> str:
        """Weights after ``epoch`` epochs."""
        return storage.join(self.folder, f"epoch-{epoch:05d}.safetensors")

    def save_weights(self, epoch: int, weights: dict[str, Tensor]) -> None:
        """Keep the weights of a validated epoch."""
        save_weights(self.weights_uri(epoch), weights)

    def load_weights(self, epoch: int, training: str | None = None) -> dict[str, Tensor]:
        """The weights of a validated epoch, on an object store fetched once per node.

        Args:
            epoch: from 1.
            training: see ``training``, where known; spares a request.
        """
        return load_state(self.weights_uri(epoch), version=training)

    def training(self) -> str:
        """What tells this training from another one of the same job: what it took and how its loss went."""
        return json.dumps(self.trained(), sort_keys=True)

    def save_state(self, state: dict[str, Any]) -> None:
        """Keep what training can go on from."""
        buffer = io.BytesIO()
        torch.save({**state, "content_sha": self.job.content_sha}, buffer)
        storage.write_bytes(storage.join(self.folder, "state.pt"), buffer.getvalue())

    def load_state(self, device: torch.device) -> dict[str, Any] | None:
        """The last kept state, None where there is none of this job's content."""
        try:
            data = storage.read_bytes(storage.join(self.folder, "state.pt"))
        except FileNotFoundError:
            return None
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        return state if state["content_sha"] == self.job.content_sha else None

    def save_trained(self, losses: list[float], seconds: float) -> None:
        """Say that training is complete; the state is no longer needed."""
        record = {"content_sha": self.job.content_sha, "losses": losses, "seconds": seconds}
        storage.write_json(storage.join(self.folder, "trained.json"), record)
        storage.remove(storage.join(self.folder, "state.pt"))

    def trained(self) -> dict[str, Any] | None:
        """``losses`` and ``seconds`` of the training, None while it is not complete."""
        return self._record(storage.join(self.folder, "trained.json"))

    def save_failed(self, reason: str) -> None:
        """Say why training gave nothing."""
        storage.write_json(
            storage.join(self.folder, "failed.json"), {"content_sha": self.job.content_sha, "reason": reason}
        )

    def pop_failed(self) -> str | None:
        """Why training gave nothing; asked once, since the next run tries again."""
        uri = storage.join(self.folder, "failed.json")
        record = self._record(uri)
        storage.remove(uri)
        return record["reason"] if record else None

    def save_result(self, result: dict[str, Any]) -> None:
        """Commit the result and drop all weights but the last epoch's."""
        storage.write_json(self.result_uri, {**result, "content_sha": self.job.content_sha})
        for epoch in self.job.val_epochs[:-1]:
            storage.remove(self.weights_uri(epoch))

    def result(self) -> dict[str, Any] | None:
        """The committed result, None where there is none of this job's content."""
        return self._record(self.result_uri)

    def _record(self, uri: str) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = storage.read_json(uri)
        except (FileNotFoundError, ValueError):
            return None
        return record if record.get("content_sha") == self.job.content_sha else None
