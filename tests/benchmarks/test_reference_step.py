"""The published way of a step and ours have the same loss and gradient."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.data import DataSpec
from stages.recover.objective import LocalObjective
from stages.recover.options import RecoverOptions
from stages.recover.reference import ReferenceStep
from stages.teachers.build import build_network
from stages.teachers.options import TeacherSpec
from stages.teachers.teacher import Teacher

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

# Small, for float64 takes its time.
DATA = DataSpec(16, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), tuple("abcde"))
POOL = ("builtin:resnet10", "builtin:vgg_bn", "builtin:mobilenetv2", "builtin:shufflenetv2", "builtin:wrn16_2")


@pytest.mark.parametrize("names", [POOL[:1], POOL[1:3], POOL])
def test_loss_and_gradient_in_float64(names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    pool = {name: build_network(TeacherSpec(arch=name), 5, 3, seed=1).double() for name in names}
    for network in pool.values():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2.0)
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    options = RecoverOptions(r_bn=0.3)
    ours = LocalObjective(
        {name: Teacher(name, network, DATA, num_outputs=5) for name, network in pool.items()}, options
    )
    ours.prepare(names[:1], names, x[:1])
    found = ours.step(x, y, names[:1], names)
    x.requires_grad_()
    loss = ReferenceStep(pool, names[0], names, r_bn=0.3).loss(x, y)
    (gradient,) = torch.autograd.grad(loss, [x])
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-10, atol=0)
    assert (found.gradient - gradient).norm() <= 1e-8 * gradient.norm()


def test_the_comparison_runs(capsys: pytest.CaptureFixture[str]) -> None:
    import recover_step

    recover_step.main("smoke", "1")
    found = json.loads(capsys.readouterr().out)
    for table in ("image_steps_per_s", "ratio", "peak_mb_per_image", "peak_ratio"):
        assert found[table].keys() == {"reference", "memory"}
    assert found["ratio"]["reference"] == found["peak_ratio"]["reference"] == 1
    assert min(found["peak_mb_per_image"].values()) > 0
