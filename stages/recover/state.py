"""A unit in the middle of its steps: what it takes to go on from there to the same bytes, and its file.

The file is safetensors: tensors, and text metadata with the rest as JSON. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

BN_PREFIX = "last_bn."


@dataclass(frozen=True)
class RecoveryState:
    """A unit after so many steps. Random numbers need no state: they are drawn by the number of the step.

    Attributes:
        step: steps made.
        pixels: float32 [n, C, S, S], normalised.
        exp_avg, exp_avg_sq: Adam's averages, of the same shape; its own count of steps equals ``step``.
        first_bad: the first step with a value that is not finite; the unit's number of steps where there is none.
        last_bn: teacher → its last L_BN, scalars.
        log: losses so far.
    """

    step: int
    pixels: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    first_bad: int
    last_bn: dict[str, Tensor]
    log: list[dict[str, Any]]

    def to_bytes(self, key: Mapping[str, Any]) -> bytes:
        """One file.

        Args:
            key: what the state belongs to, plain values.
        """
        tensors = {"pixels": self.pixels, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        tensors |= {BN_PREFIX + name: value for name, value in self.last_bn.items()}
        # Copies, since on a CPU these are the very tensors that the next step changes.
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        record = {
            "key": key,
            "step": self.step,
            "first_bad": self.first_bad,
            "log": self.log,
            # safetensors notices a file that is cut off, but not a changed byte.
            "sha256": _digest(tensors),
        }
        return safetensors.torch.save(tensors, {"state": json.dumps(record)})

    @classmethod
    def from_bytes(cls, content: bytes, key: Mapping[str, Any]) -> RecoveryState | None:
        """The state in a file; None where it belongs to another ``key`` or is damaged."""
        try:
            tensors = safetensors.torch.load(content)
            # The header's length, then the header as JSON: the loader above gives no metadata.
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            record = json.loads(header["__metadata__"]["state"])
            # As JSON gives it back: tuples are lists there.
            if record["key"] != json.loads(json.dumps(key)) or record["sha256"] != _digest(tensors):
                return None
            return cls(
                step=record["step"],
                pixels=tensors["pixels"],
                exp_avg=tensors["exp_avg"],
                exp_avg_sq=tensors["exp_avg_sq"],
                first_bad=record["first_bad"],
                last_bn={name.removeprefix(BN_PREFIX): t for name, t in tensors.items() if name.startswith(BN_PREFIX)},
                log=record["log"],
            )
        except (safetensors.SafetensorError, ValueError, LookupError, TypeError):
            return None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
