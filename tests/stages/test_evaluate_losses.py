"""Student losses and learning rates against the formulas in float64 numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.evaluate.losses import student_loss
from stages.evaluate.options import Protocol
from stages.evaluate.schedules import lr_multiplier

BATCH, CLASSES = 7, 10


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "logits": rng.normal(0, 3, (BATCH, CLASSES)),
        "teacher": rng.normal(0, 5, (BATCH, CLASSES)),
        "labels": rng.integers(0, CLASSES, BATCH),
        "partners": rng.integers(0, CLASSES, BATCH),
        "lam": rng.random(BATCH),
    }


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x)
    return e / e.sum(axis=1, keepdims=True)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.array([-math.log(p[label]) for p, label in zip(softmax(logits), labels, strict=True)])


def measured(batch: dict[str, np.ndarray], **options: object) -> float:
    tensors = [torch.from_numpy(batch[k]) for k in ("logits", "teacher", "labels", "partners", "lam")]
    return student_loss(Protocol.model_validate(options), *tensors).item()


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.025])
def test_mse_plus_hard_label_of_the_unmixed_image(batch: dict[str, np.ndarray], weight: float) -> None:
    mse = ((batch["logits"] - batch["teacher"]) ** 2).sum() / (BATCH * CLASSES)
    expected = mse + weight * cross_entropy(batch["logits"], batch["labels"]).mean()
    assert measured(batch, loss="mse_ce", ce_weight=weight) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_kl_is_teacher_to_student_batch_mean_without_t_squared(
    batch: dict[str, np.ndarray], temperature: float
) -> None:
    p, q = softmax(batch["teacher"] / temperature), softmax(batch["logits"] / temperature)
    expected = sum(p[i, k] * (math.log(p[i, k]) - math.log(q[i, k])) for i in range(BATCH) for k in range(CLASSES))
    assert measured(batch, loss="kl", temperature=temperature) == pytest.approx(expected / BATCH, rel=1e-10)


def test_hard_labels_are_shared_by_lambda(batch: dict[str, np.ndarray]) -> None:
    own, other = (cross_entropy(batch["logits"], batch[k]) for k in ("labels", "partners"))
    expected = (batch["lam"] * own + (1 - batch["lam"]) * other).mean()
    assert measured(batch, loss="ce") == pytest.approx(expected, rel=1e-12)
    batch["lam"][:] = 1
    assert measured(batch, loss="ce") == pytest.approx(own.mean(), rel=1e-12)


def test_kl_gradient_vanishes_where_student_equals_teacher(batch: dict[str, np.ndarray]) -> None:
    logits = torch.from_numpy(batch["teacher"] + 4.0).requires_grad_()
    others = [torch.from_numpy(batch[k]) for k in ("teacher", "labels", "partners", "lam")]
    loss = student_loss(Protocol(loss="kl", temperature=2.0), logits, *others)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(loss.item()) < 1e-12
    assert gradient.abs().max() < 1e-12


def reference_lr(kind: str, zeta: float, t: float) -> float:
    smooth = 0.5 * (1 + np.cos(np.pi * np.float64(t) / zeta))
    if kind == "cosine":
        return 0.5 * (1 + np.cos(np.pi * np.float64(t)))
    if kind == "smoothed_cosine" or t <= 5 / 6:
        return smooth
    return 0.5 * (1 + np.cos(np.pi * (5 / 6) / zeta)) * (6 - 6 * t)


@given(
    kind=st.sampled_from(["cosine", "smoothed_cosine", "ssrs"]),
    zeta=st.floats(1, 5),
    t=st.floats(0, 1),
)
def test_learning_rate_follows_the_formula(kind: str, zeta: float, t: float) -> None:
    protocol = Protocol(schedule=kind, zeta=zeta)
    assert lr_multiplier(protocol, t) == pytest.approx(reference_lr(kind, zeta, t), rel=1e-9, abs=1e-12)


def test_published_schedule_at_known_epochs() -> None:
    """PRISM: 300 epochs, zeta 2.5; 0.5(1+cos(pi·150/750)), the knee at 250, half of it at 275, 0 at 300."""
    published = Protocol(schedule="ssrs", zeta=2.5)
    assert lr_multiplier(published, 0) == 1
    assert lr_multiplier(published, 150 / 300) == pytest.approx(0.904508497187)
    assert lr_multiplier(published, 250 / 300) == pytest.approx(0.75)
    assert lr_multiplier(published, 275 / 300) == pytest.approx(0.375)
    assert lr_multiplier(published, 1) == pytest.approx(0, abs=1e-15)


def test_smoothed_cosine_ends_above_zero_and_zeta_below_one_is_refused() -> None:
    assert lr_multiplier(Protocol(schedule="smoothed_cosine", zeta=2), 1) == pytest.approx(0.5)
    with pytest.raises(ValidationError, match="zeta"):
        Protocol(zeta=0.5)
