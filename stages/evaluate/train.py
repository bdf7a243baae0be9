"""Training the pending students in Ray Train worker groups."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from cluster import storage
from cluster.errors import RunError
from cluster.follow import follow
from cluster.progress import ProgressWriter
from cluster.resources import TrainResources
from cluster.runner import Row
from cluster.worker import Worker
from stages.data import DataSpec
from stages.device import pick_device, reproducible
from stages.evaluate.core import StudentTraining, new_student, train_student
from stages.evaluate.jobs import StudentJob
from stages.evaluate.store import StudentStore
from stages.imageset import ImageSet, load_image_set
from stages.relabel.store import LabelReader
from stages.training import torch_threads

# A state is three times the weights; a kill then loses about a minute.
STATE_INTERVAL_S = 60.0


def train_students(
    out_uri: str, jobs: list[StudentJob], data: DataSpec, resources: TrainResources, *, serial: bool = False
) -> list[Row]:
    """Train the jobs that are not trained yet; what is on storage decides, so a killed run goes on.

    Args:
        out_uri: the run directory.
        jobs: all jobs; those trained or evaluated already are skipped.
        data: image size, normalisation, classes.
        resources: of the worker group.
        serial: in this process, without Ray.

    Returns:
        One row per pending job: ``id``, and ``error`` where it could not be trained.

    Raises:
        UserError: nothing could be trained (bad network, unreadable images).
    """
    stores = [StudentStore(out_uri, job) for job in jobs]
    pending = [s.job for s in stores if not s.result() and not s.trained()]
    if not pending:
        return []
    progress_uri = storage.join(out_uri, "progress", "train_students")
    storage.remove(progress_uri)
    lost = "training ended without it; run again"
    with follow(progress_uri, "train", sum(job.epochs for job in pending), "epochs"):
        if serial:
            with torch_threads(resources.threads):
                train_jobs(out_uri, pending, data, Worker(str(pick_device(resources.gpus != 0))))
        else:
            from cluster.training import run_trainers, settle

            config = {
                "out_uri": out_uri,
                "jobs": [job.model_dump(mode="json") for job in pending],
                "data": asdict(data),
            }
            ray_uri = storage.join(out_uri, "progress", "ray")
            settled = settle(resources, len(jobs), "resources.evaluate")
            try:
                run_trainers(train_loop, config, len(pending), settled, name="students", storage_uri=ray_uri)
            except RunError as error:
                # Those that were trained before are worth a validation all the same.
                lost = str(error)
    rows = []
    for job in pending:
        store = StudentStore(out_uri, job)
        failed = store.pop_failed() or lost
        rows.append({"id": job.id, "error": "" if store.trained() else failed})
    return rows


def train_loop(config: dict[str, Any], indices: Iterable[int], worker: Worker) -> None:
    """What each Ray Train worker runs."""
    jobs = [StudentJob.model_validate(job) for job in config["jobs"]]
    train_jobs(config["out_uri"], (jobs[index] for index in indices), DataSpec(**config["data"]), worker)


@reproducible()
def train_jobs(out_uri: str, jobs: Iterable[StudentJob], data: DataSpec, worker: Worker) -> None:
    """Train jobs one after the other; one whose loss diverges is noted and the others go on."""
    progress_uri = storage.join(out_uri, "progress", "train_students")
    decoded: tuple[str, ImageSet] | None = None
    with ThreadPoolExecutor(1) as pool:
        for job in jobs:
            store = StudentStore(out_uri, job)
            if store.trained():
                continue
            if decoded is None or decoded[0] != job.images_uri:
                decoded = job.images_uri, load_image_set(job.images_uri, data)
            writer = ProgressWriter(progress_uri, job.id)
            title = f"{job.method} {job.student} seed {job.seed}"

            def say(epoch: int, job: StudentJob = job, writer: ProgressWriter = writer, title: str = title) -> None:
                if worker.rank == 0:
                    writer.update(epoch, job.epochs, f"{title} epoch {epoch}/{job.epochs}", **worker.share)

            try:
                train_job(store, decoded[1], data, worker, pool, say)
            except RunError as error:
                if worker.rank == 0:
                    store.save_failed(str(error))


def train_job(
    store: StudentStore,
    images: ImageSet,
    data: DataSpec,
    worker: Worker,
    pool: ThreadPoolExecutor,
    say: Callable[[int], None],
) -> None:
    """Train one student from its last kept state, saving the weights of validated epochs.

    Args:
        store: of the job.
        images: what it is trained on.
        data: normalisation.
        worker: this process.
        pool: of one thread, to read labels ahead.
        say: told every finished epoch.

    Raises:
        RunError: the loss diverged.
    """
    job = store.job
    training = StudentTraining(
        new_student(job.student, job.network, data, job.seed),
        images,
        job.protocol,
        data,
        job.epochs,
        job.seed,
        worker,
    )
    state = store.load_state(training.device)
    seconds = 0.0
    if state:
        training.restore(state)
        seconds = state["seconds"]
    elif worker.rank == 0:
        storage.remove(store.folder)
    start = kept = time.monotonic()
    for _ in train_student(training, LabelReader(job.labels_uri, data, pool).read_epoch):
        say(training.epoch)
        if worker.rank != 0:
            continue
        # Before the state, so that a state of a later epoch never lacks the weights of an earlier one.
        if training.epoch in job.val_epochs:
            store.save_weights(training.epoch, training.weights())
        now = time.monotonic()
        if now - kept > STATE_INTERVAL_S:
            store.save_state({**training.state(), "seconds": seconds + now - start})
            kept = now
    if worker.rank == 0:
        store.save_trained(training.losses, seconds + time.monotonic() - start)
