"""Actors of a pool without GPUs keep off a GPU that they can see; on one, all work is repeatable."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cluster.resources import ActorResources
from cluster.worker import Worker
from stages.data import DataSpec
from stages.device import pick_device
from stages.evaluate.core import StudentTraining
from stages.evaluate.diversity import diversity_stage
from stages.evaluate.options import Protocol
from stages.evaluate.train import train_jobs
from stages.evaluate.validate import count_correct
from stages.imageset import ImageSet
from stages.recover.options import RecoverOptions
from stages.recover.stage import recover_stage
from stages.relabel.options import RelabelOptions
from stages.relabel.stage import TeacherStage, relabel_stages
from stages.relabel.store import EpochLabels
from stages.relabel.unit import LabelUnit
from stages.relabel.views import draw_views
from stages.squeeze.stage import run_jobs
from stages.teachers.options import TeacherSpec

DATA = DataSpec(8, 3, (0.5,) * 3, (0.2,) * 3, ("a", "b"))
SPEC = TeacherSpec(arch="builtin:convnet_d3", weights="w")


@pytest.mark.parametrize(("gpu", "there", "kind"), [(1, 1, "cuda"), (1, 0, "cpu"), (0, 1, "cpu"), (0, 0, "cpu")])
def test_device(monkeypatch, gpu, there, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(there))
    assert pick_device(bool(gpu)).type == kind


class Flags(torch.nn.Module):
    """Answers like a network, and notes how cuDNN would compute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def note(self) -> Iterator[int]:
        self.seen.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark))
        yield from ()

    def forward(self, x):
        list(self.note())
        return torch.zeros(len(x), 2)


def label(flags: Flags) -> None:
    stage = TeacherStage.__new__(TeacherStage)
    stage.options, stage.seed, stage.data, stage.device = RelabelOptions(batch=4), 0, DATA, torch.device("cpu")
    stage.images, stage.teacher = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), flags
    stage.label(LabelUnit(epoch_start=0, epoch_stop=1, position_start=0, position_stop=4, num_images=4))


def squeeze(flags: Flags, folder: str) -> None:
    empty = {"out_uri": folder, "jobs": [], "train_uri": folder, "val_uri": folder, "options": {}, "seed": 0}
    run_jobs({**empty, "data": dataclasses.asdict(DATA)}, flags.note(), Worker())


WORK = {
    "label": lambda flags, folder: label(flags),
    "squeeze": squeeze,
    "evaluate": lambda flags, folder: train_jobs(folder, flags.note(), DATA, Worker()),
    "validate": lambda flags, folder: count_correct(
        flags, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), DATA, "tf32"
    ),
}


@pytest.mark.parametrize("name", WORK)
def test_what_is_computed_on_a_gpu_is_computed_the_same_way_every_time(monkeypatch, tmp_path, name):
    monkeypatch.setattr("stages.squeeze.stage.load_dataset", lambda *arguments: None)
    monkeypatch.setattr("stages.squeeze.stage.RealImages", lambda *arguments, **options: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    flags = Flags()
    WORK[name](flags, str(tmp_path))
    assert flags.seen == [(True, False)]
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (False, True)


class Precise(torch.nn.Module):
    """A linear student that notes in what it is asked to compute, and what it then gives."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = torch.nn.Linear(3 * 8 * 8, 2), []

    def forward(self, x):
        out = self.linear(x.flatten(1))
        self.seen.append((torch.backends.cudnn.allow_tf32, x.dtype, out.dtype))
        return out


def label_precisely(network: Precise, precision: str) -> None:
    stage = TeacherStage.__new__(TeacherStage)
    stage.options, stage.seed, stage.data = RelabelOptions(batch=4, precision=precision), 0, DATA
    stage.device, stage.teacher = torch.device("cpu"), network
    stage.images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    logits = stage.label(LabelUnit(epoch_start=0, epoch_stop=1, position_start=0, position_stop=4, num_images=4))
    assert logits.dtype == np.float32


def train_precisely(network: Precise, precision: str) -> None:
    images = ImageSet(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    training = StudentTraining(network, images, Protocol(batch=4, precision=precision), DATA, 1, 0, Worker())
    training.train_epoch(EpochLabels(draw_views(0, 0, 4, 8, RelabelOptions()), np.ones((4, 2), np.float16)))
    assert {p.dtype for p in network.parameters()} == {p.grad.dtype for p in network.parameters()} == {torch.float32}


PRECISE = {
    "label": label_precisely,
    "train": train_precisely,
    "validate": lambda network, precision: count_correct(
        network, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), DATA, precision
    ),
}


@pytest.mark.parametrize("name", PRECISE)
@pytest.mark.parametrize(
    ("precision", "tf32", "dtype"),
    [("fp32", False, torch.float32), ("tf32", True, torch.float32), ("bf16", False, torch.bfloat16)],
)
def test_precision_is_as_asked(monkeypatch, name, precision, tf32, dtype):
    """Images are float32 in any case; the caller's own flags are back afterwards."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    network = Precise()
    PRECISE[name](network, precision)
    assert network.seen == [(tf32, torch.float32, dtype)]
    assert torch.backends.cudnn.allow_tf32 == (not tf32)


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
    for module in ("recover.stage", "relabel.stage", "evaluate.diversity"):
        monkeypatch.setattr(f"stages.{module}.load_teacher", load)
    for stage in stages:
        with pytest.raises(KeyboardInterrupt):
            stage.factory(**stage.kwargs)
    assert chosen == [wanted] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_is_kept_or_given_back() -> None:
    """In a process of its own, for it is a switch of the whole process."""
    script = """
import torch
from pathlib import Path
from stages.device import reuse_memory

def resident():
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS")]
    return int(line.split()[1]) / 1024

for on in (False, True, False):
    reuse_memory(on)
    before = resident()
    x = torch.ones(2**25)
    held, x = resident() - before, None
    print(round(held), round(resident() - before))
reuse_memory(True)
x = torch.ones(2**25)
x = None
reuse_memory(False)
print(0, round(resident() - before))
"""
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    (off, freed), (on, kept), (_, again), (_, trimmed) = (map(int, line.split()) for line in found.splitlines())
    assert min(off, on) > 120
    assert kept > 120
    assert max(freed, again, trimmed) < 30
