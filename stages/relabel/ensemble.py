"""How the logits of several teachers become one soft label (methods: PRISM, G-VBSM, EDC, CV-DD)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.relabel.options import RelabelOptions


def combine(logits: Sequence[Tensor], options: RelabelOptions) -> Tensor:
    """Combine the logits of one label batch.

    Args:
        logits: float32 [B, C] of each teacher, in the order of ``options.teachers``; the norms of the rules
            are those of these B rows.
        options: ``ensemble``, and ``priors`` where the rule has them.

    Returns:
        float32 [B, C].
    """
    # Norms are sums over many squares; in float64 they are exact enough for any number of threads.
    return RULES[options.ensemble]([z.to(torch.float64) for z in logits], options).to(torch.float32)


def _mean(logits: list[Tensor], options: RelabelOptions) -> Tensor:
    """(1/K) · Σ z_k (EDC)."""
    return _weighted(logits, [1 / len(logits)] * len(logits))


def _frobenius_mean(logits: list[Tensor], options: RelabelOptions) -> Tensor:
    """(1/K) · Σ (n̄ / n_k) · z_k, where n_k = ‖z_k‖_F and n̄ is their mean (G-VBSM; PRISM with ResNet-18)."""
    norms = [float(torch.linalg.vector_norm(z)) for z in logits]
    target = math.fsum(norms) / len(norms)
    return _weighted(logits, [target / (n or 1.0) / len(logits) for n in norms])


def _primary_half(logits: list[Tensor], options: RelabelOptions) -> Tensor:
    """½ z_1 + ½ mean of the others, each row then to the batch's mean L2 norm (PRISM with ResNet-50)."""
    others = len(logits) - 1
    mixed = _weighted(logits, [0.5, *[0.5 / others] * others]) if others else logits[0]
    norms = torch.linalg.vector_norm(mixed, dim=1, keepdim=True)
    return mixed * (norms.mean() / torch.where(norms > 0, norms, 1.0))


def _prior_softmax(logits: list[Tensor], options: RelabelOptions) -> Tensor:
    """Σ w_k z_k with w = softmax(prior / 10), priors in percent (CV-DD)."""
    priors = [options.priors[name] for name in options.teachers]
    scores = [math.exp((prior - max(priors)) / 10) for prior in priors]
    return _weighted(logits, [s / math.fsum(scores) for s in scores])


def _weighted(logits: list[Tensor], weights: list[float]) -> Tensor:
    total = logits[0] * weights[0]
    for z, weight in zip(logits[1:], weights[1:], strict=True):
        total = total + z * weight
    return total


RULES: dict[str, Callable[[list[Tensor], RelabelOptions], Tensor]] = {
    "mean": _mean,
    "frobenius_mean": _frobenius_mean,
    "primary_half": _primary_half,
    "prior_softmax": _prior_softmax,
}
