"""Testing every kept epoch of every student on all real validation images."""

from __future__ import annotations

import json
import uuid
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster import shards, storage
from cluster.attempts import Attempts
from cluster.progress import StageProgress
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row, Runner
from stages.data import DataSpec
from stages.device import autocast, pick_device, reproducible
from stages.evaluate.jobs import StudentJob
from stages.evaluate.store import StudentStore
from stages.recover.options import Precision
from stages.teachers.build import build_network, memory_format
from stages.teachers.pixels import shared_pixels

# Rows of a unit: seconds to minutes of work, so that pools of any size end together.
SLICE_ROWS = 1000
BATCH = 200
# Decoded images that an actor keeps; each slice comes back once for every job.
CACHE_BYTES = 2**30


def count_correct(
    network: nn.Module, pixels: Tensor, labels: Tensor, data: DataSpec, precision: Precision
) -> tuple[int, int]:
    """Top-1 and top-5 hits; with fewer than five classes the latter are the hits among all of them.

    Args:
        network: in eval mode, on the device to use.
        pixels: uint8 [n, C, S, S].
        labels: int64 [n].
        data: normalisation.
        precision: of the network's passes.
    """
    device, layout = next(network.parameters()).device, memory_format(network)
    top1 = top5 = 0
    with reproducible(precision), torch.inference_mode(), autocast(device, precision):
        for start in range(0, len(labels), BATCH):
            x = data.normalise(pixels[start : start + BATCH].to(device))
            logits = network(x.contiguous(memory_format=layout))
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()
            hits = best == labels[start : start + BATCH, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.sum())
    return top1, top5


class ValidateStage:
    """Counts the hits of all kept epochs of one job on one slice of the validation images.

    Networks are built once per architecture, weights are loaded one epoch at a time, decoded slices are kept
    within ``CACHE_BYTES``; they are fetched and decoded once per node.

    Args:
        out_uri: the run directory.
        jobs: as JSON.
        data: the run's image space.
        dataset_uri: imported validation data.
        gpu: use the actor's GPU where it has one.
    """

    def __init__(self, out_uri: str, jobs: list[str], data: DataSpec, dataset_uri: str, gpu: bool):
        self.out_uri, self.data = out_uri, data
        self.jobs = [StudentJob.model_validate_json(job) for job in jobs]
        self.dataset = shards.load_dataset(dataset_uri)
        self.device = pick_device(gpu)
        self.networks: dict[str, nn.Module] = {}
        self.decoded: OrderedDict[tuple[int, int], tuple[Tensor, Tensor]] = OrderedDict()
        self.trainings: dict[str, str] = {}

    def __call__(self, row: Row) -> Row:
        """``job`` on ``start:stop`` of ``shard`` → ``images`` and ``counts``, JSON of (epoch, top1, top5)."""
        job = self.jobs[row["job"]]
        pixels, labels = self._slice(row["shard"], row["start"], row["stop"])
        network = self._network(job)
        store = StudentStore(self.out_uri, job)
        if job.id not in self.trainings:
            self.trainings[job.id] = store.training()
        counts = []
        for epoch in job.val_epochs:
            network.load_state_dict(store.load_weights(epoch, self.trainings[job.id]))
            counts.append([epoch, *count_correct(network, pixels, labels, self.data, job.protocol.precision)])
        return {
            "id": row["id"],
            "error": "",
            "job": row["job"],
            "images": len(labels),
            "counts": json.dumps(counts),
        }

    def _network(self, job: StudentJob) -> nn.Module:
        key = job.network.model_dump_json()
        if key not in self.networks:
            network = build_network(job.network, self.data.num_classes, self.data.channels)
            layout = memory_format(network)
            self.networks[key] = network.to(device=self.device, memory_format=layout).eval()  # type: ignore[call-overload]
        return self.networks[key]

    def _slice(self, shard: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        key = (shard, start)
        if key not in self.decoded:
            self.decoded[key] = shared_pixels(self.dataset, shard, start, stop, self.data)
            while len(self.decoded) > 1 and sum(p.nbytes for p, _ in self.decoded.values()) > CACHE_BYTES:
                self.decoded.popitem(last=False)
        self.decoded.move_to_end(key)
        return self.decoded[key]


def validate_students(
    out_uri: str,
    jobs: list[StudentJob],
    data: DataSpec,
    dataset_uri: str,
    resources: ActorResources,
    runner: Runner,
) -> list[Row]:
    """Evaluate the trained jobs that have no result; each is committed as soon as all its slices are counted.

    Args:
        out_uri: the run directory.
        jobs: all jobs; those with a result, or not trained, are skipped.
        data: the run's image space.
        dataset_uri: imported validation data, all of which is used.
        resources: of the actor pool.
        runner: serial or Ray.

    Returns:
        One row per evaluated job: ``id``, and ``error`` where a slice of it failed.

    Raises:
        UserError: no dataset at ``dataset_uri``.
    """
    dataset = shards.load_dataset(dataset_uri, "data.val")
    stores = [StudentStore(out_uri, job) for job in jobs]
    stores = [store for store in stores if store.trained() and not store.result()]
    slices = list(_slices(dataset))
    # Job by job, so that results come in one after the other and a kill loses little.
    rows: list[Row] = [
        {
            "id": f"{store.job.id}-{shard:05d}-{start:07d}",
            "error": "",
            "job": index,
            "shard": shard,
            "start": start,
            "stop": stop,
        }
        for index, store in enumerate(stores)
        for shard, start, stop in slices
    ]
    if not rows:
        return []
    stage = ActorStage(
        "validate",
        ValidateStage,
        {
            "out_uri": out_uri,
            "jobs": [store.job.model_dump_json() for store in stores],
            "data": data,
            "dataset_uri": dataset_uri,
            "gpu": resources.gpus != 0,
        },
        resources,
        Attempts(
            storage.join(out_uri, "progress", "starts", "validate"), uuid.uuid4().hex, "lower resources.validate.actors"
        ),
    )
    owner = {row["id"]: row["job"] for row in rows}
    counted: list[list[Row]] = [[] for _ in stores]
    errors = [""] * len(stores)
    with StageProgress("validate", len(rows), "slices") as shown:
        for row in runner(rows, [stage]):
            index = owner[row["id"]]
            job = stores[index].job
            errors[index] = errors[index] or row["error"]
            counted[index].append(row)
            if len(counted[index]) == len(slices) and not errors[index]:
                stores[index].save_result(_result(stores[index], counted[index]))
            shown.advance(f"{job.method} {job.student} seed {job.seed}")
    return [{"id": s.job.id, "error": error} for s, error in zip(stores, errors, strict=True)]


def _slices(dataset: shards.Dataset) -> Iterable[tuple[int, int, int]]:
    for shard, (_, rows) in enumerate(dataset.shards):
        for start in range(0, rows, SLICE_ROWS):
            yield shard, start, min(start + SLICE_ROWS, rows)


def _result(store: StudentStore, rows: list[Row]) -> dict[str, Any]:
    """The result of a job; accuracies in percent of all validation images."""
    job, trained = store.job, store.trained()
    assert trained is not None
    images = sum(row["images"] for row in rows)
    hits = np.sum([[counts[1:] for counts in json.loads(row["counts"])] for row in rows], axis=0)
    curve = [
        {"epoch": epoch, "top1": 100 * int(one) / images, "top5": 100 * int(five) / images}
        | {"loss": trained["losses"][epoch - 1]}
        for epoch, (one, five) in zip(job.val_epochs, hits, strict=True)
    ]
    return {
        "method": job.method,
        "recipe": job.recipe,
        "student": job.student,
        "protocol": job.protocol.name,
        "seed": job.seed,
        "ipc": job.ipc,
        "epochs": job.epochs,
        "top1_last": curve[-1]["top1"],
        "top1_best": max(point["top1"] for point in curve),
        "top5_last": curve[-1]["top5"],
        "curve": curve,
        "seconds_train": trained["seconds"],
        "val_images": images,
    }


def read_results(out_uri: str, jobs: list[StudentJob]) -> list[dict[str, Any]]:
    """The committed results in the order of the jobs; missing ones are left out."""
    found = [StudentStore(out_uri, job).result() for job in jobs]
    return [result for result in found if result]
