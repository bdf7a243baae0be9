"""Learning rate over the course of training, as a multiple of the configured one."""

from __future__ import annotations

import math

from stages.evaluate.options import Protocol

# Where SSRS leaves the smoothed cosine (EDC, "5/6 of training").
SSRS_KNEE = 5 / 6


def lr_multiplier(protocol: Protocol, progress: float) -> float:
    """Multiplier at a share of training.

    * ``cosine``: ½(1 + cos πt)
    * ``smoothed_cosine``: ½(1 + cos(πt / ζ)), which ends above 0 for ζ > 1 (EDC)
    * ``ssrs``: smoothed cosine up to t = 5/6, from its value there straight to 0 at t = 1 (EDC, PRISM)

    Args:
        protocol: ``schedule`` and ``zeta`` are read.
        progress: t, finished steps / all steps, in [0, 1]. The papers step once an epoch; we step every
            batch along the same curve.
    """
    if protocol.schedule == "cosine":
        return _cosine(progress)
    if protocol.schedule == "smoothed_cosine" or progress <= SSRS_KNEE:
        return _cosine(progress / protocol.zeta)
    return _cosine(SSRS_KNEE / protocol.zeta) * (1 - progress) / (1 - SSRS_KNEE)


def _cosine(t: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * t))
