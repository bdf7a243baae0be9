"""Actors of a pool without GPUs keep off a GPU that they can see."""

from __future__ import annotations

import pytest
import torch

from cluster.resources import ActorResources
from stages.data import DataSpec
from stages.device import pick_device
from stages.evaluate.diversity import diversity_stage
from stages.recover.options import RecoverOptions
from stages.recover.stage import recover_stage
from stages.relabel.options import RelabelOptions
from stages.relabel.stage import relabel_stages
from stages.teachers.options import TeacherSpec

DATA = DataSpec(8, 3, (0.5,) * 3, (0.2,) * 3, ("a", "b"))
SPEC = TeacherSpec(arch="builtin:convnet_d3", weights="w")


@pytest.mark.parametrize(("gpu", "there", "kind"), [(1, 1, "cuda"), (1, 0, "cpu"), (0, 1, "cpu"), (0, 0, "cpu")])
def test_device(monkeypatch, gpu, there, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(there))
    assert pick_device(bool(gpu)).type == kind


@pytest.mark.parametrize(("gpus", "wanted"), [(None, "cuda"), (0.5, "cuda"), (0, "cpu")])
def test_stages_keep_to_their_pool(monkeypatch, gpus, wanted):
    """Each is built as a runner does it; where its teacher would be loaded says which device it chose."""
    chosen = []

    def load(name, spec, data, device):
        chosen.append(torch.device(device).type)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self)
    resources = ActorResources(gpus=gpus)
    options = RecoverOptions(logit_teachers=["t"], bn_teachers=["t"], init="noise")
    stages = [
        recover_stage("out", "train", {"t": SPEC}, DATA, options, "i", resources),
        relabel_stages("l", "i", {"t": SPEC}, DATA, RelabelOptions(teachers=["t"]), 0, "i", resources, "p")[0],
        diversity_stage("t", SPEC, DATA, resources),
    ]
    images = type("Images", (), {"images_near": lambda self, device: torch.zeros(1)})()
    monkeypatch.setattr("stages.relabel.stage.load_image_set", lambda *args: images)
    for module in ("recover.placement", "relabel.stage", "evaluate.diversity"):
        monkeypatch.setattr(f"stages.{module}.load_teacher", load)
    for stage in stages:
        with pytest.raises(KeyboardInterrupt):
            stage.factory(**stage.kwargs)
    assert chosen == [wanted] * 3
