"""How near relabelling and the training of students come to a loop over one batch that is there already.

    python benchmarks/device_speed.py 224 5 > benchmarks/results/device_speed_224_cpu.json     # images, rounds
    python benchmarks/device_speed.py 32 5

A teacher labels one unit of distilled images as an actor does it (views drawn, rendered and labelled), and a student
is trained for one epoch as a worker does it (labels read from shards, views rendered). The bare loops run the same
network as often on a batch of noise that lies on the device in the network's layout, the student's with the same loss
and optimiser. Both take turns in one process; what counts are medians of images a second. bfloat16 where the processor
computes in it, else float32.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from cluster import shards, storage
from cluster.worker import Worker
from stages.data import DataSpec
from stages.device import autocast, pick_device, reproducible
from stages.evaluate.core import StudentTraining, new_student
from stages.evaluate.losses import student_loss
from stages.evaluate.options import Protocol
from stages.imageset import load_image_set
from stages.recover.options import Precision
from stages.recover.speed import Way, has_bf16, in_turns, processor
from stages.relabel.options import RelabelOptions
from stages.relabel.stage import CommitStage, TeacherStage, relabel_rows
from stages.relabel.store import LabelReader
from stages.relabel.unit import plan_units
from stages.teachers.build import build_network, memory_format
from stages.teachers.options import NetworkSpec, TeacherSpec
from stages.teachers.weights import save_weights


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        arch: of the teacher and of the student.
        size, classes, ipc, batch: of images and labels.
        epochs: of labels; every turn of the student takes the next.
    """

    arch: str
    size: int
    classes: int
    ipc: int
    batch: int
    epochs: int = 16


CASES = {
    "gpu": Case("timm:resnet18", 224, 1000, 4, 100),
    "224": Case("timm:resnet18", 224, 100, 1, 50),
    "32": Case("builtin:resnet18", 32, 10, 10, 50),
    "smoke": Case("builtin:convnet_d3", 16, 5, 2, 5, 2),
}


def write_images(uri: str, case: Case, data: DataSpec) -> None:
    """Coarse noise, as recovered shards."""
    rng = np.random.default_rng(0)
    schema = shards.image_schema(list(data.class_names), shards.RECOVERED_FIELDS)
    for ipc in range(case.ipc):
        rows = []
        for label in range(case.classes):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            encoded = io.BytesIO()
            coarse.resize((case.size, case.size)).save(encoded, format="JPEG")
            image = {"bytes": encoded.getvalue(), "path": f"{label}.jpg"}
            rows.append({"image": image, "label": label, "image_id": ipc * case.classes + label, "ipc": ipc})
        shards.write_shard(storage.join(uri, f"unit-{ipc:05d}.parquet"), pa.Table.from_pylist(rows, schema=schema))


class Relabelling:
    """The first units of labels by a teacher, as an actor makes it and barely."""

    def __init__(self, root: str, case: Case, data: DataSpec, options: RelabelOptions, device: torch.device):
        weights = storage.join(root, "teacher.safetensors")
        spec = TeacherSpec(arch=case.arch, weights=weights)
        save_weights(weights, build_network(spec, case.classes, 3, seed=0).state_dict())
        self.options, self.device = options, device
        self.stage = TeacherStage("teacher", spec, storage.join(root, "images"), data, options, 0, gpu=True)
        self.images = case.classes * case.ipc
        units = plan_units(self.images, case.classes, options)
        self.units = [unit for unit in units if unit.epoch_start == 0]
        # A unit may hold several epochs; as many rows are then labelled both ways.
        self.rows = sum(unit.num_rows for unit in self.units)
        self.batch = torch.randn(options.batch, 3, case.size, case.size, device=device)
        self.batch = self.batch.contiguous(memory_format=memory_format(self.stage.teacher.network))

    def ours(self) -> Tensor:
        return torch.from_numpy(np.concatenate([self.stage.label(unit) for unit in self.units]))

    def bare(self) -> Tensor:
        precision = self.options.precision
        with (
            reproducible(precision),
            torch.inference_mode(),
            autocast(self.device, precision),
        ):
            return torch.stack([self.stage.teacher(self.batch) for _ in range(self.rows // self.options.batch)]).float()


class Training:
    """One epoch of a student, as a worker trains it and barely."""

    def __init__(self, root: str, case: Case, data: DataSpec, labels: LabelReader, protocol: Protocol, device: str):
        self.protocol, self.epochs, self.labels = protocol, case.epochs, labels
        images = load_image_set(storage.join(root, "images"), data)
        spec = NetworkSpec(arch=case.arch)

        def student() -> StudentTraining:
            return StudentTraining(
                new_student("student", spec, data, 0), images, protocol, data, 10**6, 0, Worker(device)
            )

        self.trained, self.barely = student(), student()
        self.x = torch.randn(protocol.batch, 3, case.size, case.size, device=device)
        self.x = self.x.contiguous(memory_format=memory_format(self.barely.network))
        self.y = torch.arange(protocol.batch, device=device) % case.classes
        self.teacher = torch.randn(protocol.batch, case.classes, device=device)
        self.lam = torch.ones(protocol.batch, device=device)
        self.turn = count()

    def ours(self) -> Tensor:
        return torch.tensor(self.trained.train_epoch(self.labels.read_epoch(next(self.turn) % self.epochs)))

    def bare(self) -> Tensor:
        model, optimizer, total = (
            self.barely.model.train(),
            self.barely.optimizer,
            torch.zeros((), device=self.x.device),
        )
        with reproducible(self.protocol.precision):
            for _ in self.barely.slices:
                with autocast(self.x.device, self.protocol.precision):
                    logits = model(self.x)
                loss = student_loss(self.protocol, logits.float(), self.teacher, self.y, self.y, self.lam)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.detach()
        return total


def main(name: str, rounds: str = "3") -> None:
    case, device = CASES[name], pick_device(True)
    precision: Precision = "bf16" if has_bf16(device) else "fp32"
    names = tuple(f"c{i:04d}" for i in range(case.classes))
    data = DataSpec(case.size, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), names)
    options = RelabelOptions(teachers=["teacher"], batch=case.batch, epochs=case.epochs, precision=precision)
    protocol = Protocol(batch=case.batch, precision=precision)
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(1) as pool:
        write_images(storage.join(root, "images"), case, data)
        relabelling = Relabelling(root, case, data, options, device)
        labels_uri = storage.join(root, "labels")
        commit, rng = CommitStage(labels_uri, data, options, 0, "i"), np.random.default_rng(0)
        units = plan_units(relabelling.images, case.classes, options)
        for unit, row in zip(units, relabel_rows(units), strict=True):
            logits = rng.standard_normal((unit.num_rows, case.classes)).astype(np.float32)
            commit(row | {"logits_teacher": logits})
        training = Training(root, case, data, LabelReader(labels_uri, data, pool), protocol, str(device))
        ways = {
            "relabel": Way(relabelling.ours),
            "relabel_bare": Way(relabelling.bare),
            "student": Way(training.ours),
            "student_bare": Way(training.bare),
        }
        images = {"relabel": relabelling.rows, "student": relabelling.images}
        rates = {
            way: [images[way.removesuffix("_bare")] / value for value in values]
            for way, values in in_turns(ways, int(rounds)).items()
        }
    medians = {way: statistics.median(values) for way, values in rates.items()}
    result = {
        "case": name,
        "precision": precision,
        "images_per_s": {way: round(value, 1) for way, value in medians.items()},
        "share_of_bare": {kind: round(medians[kind] / medians[f"{kind}_bare"], 3) for kind in images},
        "rounds": {way: [round(value, 1) for value in values] for way, values in rates.items()},
        "environment": {
            "device": processor(device),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
