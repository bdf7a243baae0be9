import numpy as np
import pytest
import torch

from stages.relabel.ensemble import combine
from stages.relabel.options import RelabelOptions

NAMES = ["one", "two", "three", "four"]
PRIORS = {"one": 56.4, "two": 42.3, "three": 52.5, "four": 44.2}


def draw(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.normal(k, 3 * k + 1, (50, 10)).astype(np.float32) for k in range(count)]


def by_rule(rule: str, logits: list[np.ndarray]) -> torch.Tensor:
    chosen = RelabelOptions(teachers=NAMES[: len(logits)], ensemble=rule, priors=PRIORS)
    return combine([torch.from_numpy(z) for z in logits], chosen)


def mean(logits):
    return sum(logits) / len(logits)


def frobenius_mean(logits):
    norms = [np.sqrt((z**2).sum()) for z in logits]
    return sum(z * (np.mean(norms) / n) for z, n in zip(logits, norms, strict=True)) / len(logits)


def primary_half(logits):
    out = 0.5 * logits[0]
    for z in logits[1:]:
        out = out + 0.5 / (len(logits) - 1) * z
    lengths = np.sqrt((out**2).sum(axis=1))
    return np.stack([row / length * lengths.mean() for row, length in zip(out, lengths, strict=True)])


def prior_softmax(logits):
    weights = np.exp([PRIORS[n] / 10 for n in NAMES[: len(logits)]])
    weights /= weights.sum()
    return sum(w * z for w, z in zip(weights, logits, strict=True))


@pytest.mark.parametrize("rule", [mean, frobenius_mean, primary_half, prior_softmax])
@pytest.mark.parametrize("count", [2, 4])
def test_rules(rule, count):
    logits = draw(count)
    found = by_rule(rule.__name__, logits)
    assert found.dtype == torch.float32
    expected = rule([z.astype(np.float64) for z in logits])
    np.testing.assert_allclose(found.numpy(), expected, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("rule", ["mean", "frobenius_mean", "prior_softmax"])
def test_one_teacher_alone_is_kept(rule):
    (z,) = draw(1)
    np.testing.assert_allclose(by_rule(rule, [z]).numpy(), z, rtol=1e-6)


def test_primary_half_of_one_teacher_only_evens_the_rows():
    (z,) = draw(1)
    lengths = np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(by_rule("primary_half", [z]).numpy(), z / lengths * lengths.mean(), rtol=1e-5)


def test_frobenius_mean_ignores_a_teachers_scale_but_for_the_common_one():
    a, b = draw(2)
    once, twice = by_rule("frobenius_mean", [a, b]).numpy(), by_rule("frobenius_mean", [a, 100 * b]).numpy()
    np.testing.assert_allclose(once / np.linalg.norm(once), twice / np.linalg.norm(twice), atol=1e-6)


def test_priors_of_teachers_that_do_not_label_count_for_nothing():
    logits = [torch.from_numpy(z) for z in draw(2)]
    chosen = RelabelOptions(teachers=NAMES[:2], ensemble="prior_softmax", priors={**PRIORS, "three": 1e6})
    assert torch.equal(combine(logits, chosen), by_rule("prior_softmax", draw(2)))


def test_silent_teacher_gives_no_nan():
    a, b = draw(2)
    for rule in ("frobenius_mean", "primary_half"):
        assert torch.isfinite(by_rule(rule, [a, np.zeros_like(b)])).all()
    assert torch.isfinite(by_rule("primary_half", [a * 0, b * 0])).all()
