"""Every teacher by itself: the same objective and, within float tolerance, the same images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_recover_core import DATA, Tiny, images, unit
from torch import Tensor, nn

from cluster.errors import UserError
from stages.recover.core import recover_unit
from stages.recover.objective import LocalObjective
from stages.recover.options import RecoverOptions
from stages.recover.split import HereLink, SplitObjective, TeacherPart

POOL = ["a", "b", "c"]


class Plain(nn.Module):
    """Without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.head = nn.Linear(3, 4)
        self.bn_layers: list[nn.Module] = []
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


@pytest.fixture
def teachers() -> dict[str, Any]:
    return {"a": Tiny(0), "b": Tiny(1), "c": Tiny(2), "plain": Plain()}


def split(teachers: dict[str, Any], options: RecoverOptions) -> SplitObjective:
    return SplitObjective({n: HereLink(TeacherPart(n, t, options)) for n, t in teachers.items()}, options)


@pytest.mark.parametrize(
    ("logit", "bn"),
    [(["a"], ["a", "b", "c"]), (["a"], ["b"]), (["a", "b"], ["a", "b"]), (["plain"], ["a", "c"]), (["a"], ["plain"])],
)
def test_terms_and_gradient_of_a_batch(teachers: dict[str, Any], logit: list[str], bn: list[str]) -> None:
    options = RecoverOptions(r_bn=0.3, allow_null_bn=True)
    x, y = images(), torch.tensor([0, 2, 3])
    one, two = LocalObjective(teachers, options), split(teachers, options)
    for objective in (one, two):
        objective.prepare(logit, bn, x[:1])
    whole, parts = one.step(x, y, logit, bn), two.step(x, y, logit, bn)
    assert list(parts.l_bn) == list(whole.l_bn) == bn
    torch.testing.assert_close(parts.loss, whole.loss)
    torch.testing.assert_close(parts.ce, whole.ce)
    for name in bn:
        torch.testing.assert_close(parts.l_bn[name], whole.l_bn[name])
    torch.testing.assert_close(parts.gradient, whole.gradient)
    assert parts.gradient.abs().max() > 0


@pytest.mark.parametrize("selection", ["fixed", "per_step", "round_robin"])
def test_images_and_losses_of_a_unit(teachers: dict[str, Any], selection: Any) -> None:
    u = unit(iterations=20, logit_teachers=POOL if selection == "round_robin" else ["a"], bn_teachers=POOL)
    options = RecoverOptions(selection=selection, roll=3)
    whole = recover_unit(u, images(), teachers, options, DATA, "cpu")
    parts = recover_unit(u, images(), split(teachers, options), options, DATA, "cpu")
    gap = (parts.pixels.int() - whole.pixels.int()).abs()
    # Adam divides by the gradient's size, so where it nearly vanishes a rounding error shows.
    assert gap.float().mean() < 0.05
    assert parts.loss_ce == pytest.approx(whole.loss_ce, rel=1e-3)
    assert parts.loss_bn == pytest.approx(whole.loss_bn, rel=1e-3)
    again = recover_unit(u, images(), split(teachers, options), options, DATA, "cpu")
    assert torch.equal(again.pixels, parts.pixels)
    assert again.log == parts.log


def test_only_the_teachers_of_a_step_are_asked_and_only_for_what_is_used(teachers: dict[str, Any]) -> None:
    options = RecoverOptions()
    seen: list[tuple[str, bool, bool]] = []

    class Watched(HereLink):
        def measure(self, batch: Any, labels: Any, ce_weight: float | None, bn_weight: float | None) -> Any:
            seen.append((self._part._name, ce_weight is not None, bn_weight is not None))
            return super().measure(batch, labels, ce_weight, bn_weight)

    links = {n: Watched(TeacherPart(n, t, options)) for n, t in teachers.items()}
    objective = SplitObjective(links, options)
    objective.prepare(["a"], ["a", "b"], images()[:1])
    objective.step(images(), torch.tensor([0, 2, 3]), ["a"], ["b"])
    assert seen == [("a", True, False), ("b", False, True)]


def test_a_bn_teacher_without_layers_is_refused(teachers: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"recover.bn_teachers: plain has no BatchNorm"):
        split(teachers, RecoverOptions()).prepare(["a"], ["plain"], images()[:1])
