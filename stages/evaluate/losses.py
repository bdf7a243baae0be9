"""What a student is trained against: stored teacher logits, hard labels, or both."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stages.evaluate.options import Protocol


def student_loss(
    protocol: Protocol, logits: Tensor, teacher: Tensor, labels: Tensor, partners: Tensor, lam: Tensor
) -> Tensor:
    """Mean loss of a batch of views.

    * ``mse_ce``: MSE over all B·K logits + ``ce_weight`` · CE to the hard label of the un-mixed image
      (G-VBSM, EDC, PRISM's "mse_gt").
    * ``kl``: KL(softmax(teacher / T) ‖ softmax(student / T)), summed over classes, mean over the batch, not
      multiplied by T² (SRe2L and its followers).
    * ``ce``: CE to the hard labels of the mixed view, λ · CE(own label) + (1 − λ) · CE(partner's label), the
      usual training with CutMix or MixUp; the teacher is not looked at.

    Args:
        protocol: ``loss``, ``ce_weight`` and ``temperature`` are read.
        logits: of the student, float32 [B, K].
        teacher: stored logits, float32 [B, K].
        labels: of the images, int64 [B].
        partners: labels of the mixing partners, int64 [B].
        lam: share λ of the own image in the view, float32 [B].

    Returns:
        A scalar.
    """
    if protocol.loss == "mse_ce":
        return F.mse_loss(logits, teacher) + protocol.ce_weight * F.cross_entropy(logits, labels)
    if protocol.loss == "kl":
        student = F.log_softmax(logits / protocol.temperature, dim=1)
        target = F.log_softmax(teacher / protocol.temperature, dim=1)
        return F.kl_div(student, target, reduction="batchmean", log_target=True)
    own = F.cross_entropy(logits, labels, reduction="none")
    other = F.cross_entropy(logits, partners, reduction="none")
    return (lam * own + (1 - lam) * other).mean()
