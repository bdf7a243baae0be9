"""Squeeze: every teacher of the run ends with weights and a card, whether given or trained."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from cluster import storage
from cluster.errors import RunError, UserError
from cluster.follow import follow
from cluster.progress import ProgressWriter
from cluster.resources import Settled, TrainResources
from cluster.rng import derive_seed
from cluster.shards import Dataset, load_dataset
from cluster.worker import Worker
from stages.data import DataSpec
from stages.device import pick_device, reproducible
from stages.squeeze.augment import check_squeeze
from stages.squeeze.core import Diverged, TeacherTraining, train_epochs
from stages.squeeze.data import RealImages
from stages.squeeze.jobs import (
    TeacherJob,
    check_origin,
    commit,
    copy_teacher,
    plan_job,
    settings_digest,
    teacher_folder,
)
from stages.squeeze.options import SqueezeOptions
from stages.teachers.accuracy import Accuracy, guesses, top1
from stages.teachers.card import read_card
from stages.teachers.options import TeacherSpec
from stages.teachers.teacher import Teacher, fresh_teacher, load_teacher
from stages.training import torch_threads

# A given teacher is measured on so many validation images (standard error below 0.8 points), a trained one on all;
# both on so many training images.
GIVEN_VAL_IMAGES = 5000
TRAIN_IMAGES = 2000


def squeeze_teachers(
    out_uri: str,
    teachers: Mapping[str, TeacherSpec],
    data: DataSpec,
    train_uri: str,
    val_uri: str,
    options: SqueezeOptions,
    resources: TrainResources,
    seed: int,
    *,
    serial: bool = False,
) -> None:
    """Give every teacher that has no card yet its weights and card in ``OUT/teachers/NAME/``.

    Given weights are checked, measured and copied; the others are looked up in ``options.cache`` and else trained,
    in Ray Train worker groups. A run that is killed goes on at the next epoch of the teachers it was at, with the
    same result.

    Args:
        out_uri: the run directory.
        teachers: name → specification.
        data: the space of the images.
        train_uri: folder of the training images' shards.
        val_uri: folder of the validation images' shards.
        options: of the training.
        resources: of one worker group.
        seed: of the run.
        serial: in this process, without Ray.

    Raises:
        UserError: weights, architecture or augmentation do not fit, or a finished teacher is of other weights.
        RunError: training failed; what is finished is kept.
    """
    check_squeeze(options, data)
    train, val = load_dataset(train_uri, "data.train"), load_dataset(val_uri, "data.val")
    check_teachers(out_uri, teachers, data, train.fingerprint, options, seed)
    unfinished = {name: spec for name, spec in teachers.items() if read_card(teacher_folder(out_uri, name)) is None}
    if not unfinished:
        storage.remove(_states_uri(out_uri))
        return
    # Counted over the whole run, so that one that was interrupted goes on with as many threads.
    trainings = sum(spec.weights is None for spec in teachers.values())
    settled = _settled(resources, trainings, serial)
    fingerprints = [train.fingerprint, val.fingerprint]
    jobs = [plan_job(name, spec, options, data, fingerprints, seed, settled) for name, spec in unfinished.items()]
    pending = [job for job in jobs if not _take_cached(out_uri, job, options)]
    if not pending:
        return
    progress_uri = storage.join(out_uri, "progress", "squeeze")
    storage.remove(progress_uri)
    # Given weights first and alone: what is wrong with them shows before hours are spent on the others.
    given = [job for job in pending if job.spec.weights is not None]
    trained = [job for job in pending if job.spec.weights is None]
    with follow(progress_uri, "squeeze", sum(job.steps for job in pending), "epochs"):
        for phase in filter(None, (given, trained)):
            arguments: dict[str, Any] = {
                "out_uri": out_uri,
                "jobs": [job.model_dump(mode="json") for job in phase],
                "data": asdict(data),
                "train_uri": train_uri,
                "val_uri": val_uri,
                "options": options.model_dump(mode="json"),
                "seed": seed,
            }
            if serial:
                with torch_threads(settled.threads):
                    run_jobs(arguments, range(len(phase)), Worker(str(pick_device(settled.gpus > 0))))
            else:
                from cluster.training import run_trainers

                ray_uri = storage.join(out_uri, "progress", "ray")
                run_trainers(run_jobs, arguments, len(phase), settled, name="teachers", storage_uri=ray_uri)
    missing = [job.name for job in pending if read_card(teacher_folder(out_uri, job.name)) is None]
    if missing:
        raise RunError(f"squeeze: {', '.join(missing)} did not finish; run the same command again to resume")
    storage.remove(_states_uri(out_uri))


def check_teachers(
    out_uri: str,
    teachers: Mapping[str, TeacherSpec],
    data: DataSpec,
    fingerprint: str,
    options: SqueezeOptions,
    seed: int,
) -> None:
    """Prove that the teachers which the run directory holds are those asked for; reads weights files, builds nothing.

    Args:
        out_uri: the run directory.
        teachers: name → specification.
        data: the space of the images.
        fingerprint: of the training data.
        options: of the training.
        seed: of the run.

    Raises:
        UserError: a teacher there was made from other weights or settings.
    """
    for name, spec in teachers.items():
        settings = settings_digest(name, spec, options, data, fingerprint, seed)
        check_origin(out_uri, name, spec, settings)


def _settled(resources: TrainResources, trainings: int, serial: bool) -> Settled:
    """What each of so many trainings will have."""
    if serial:
        threads = resources.threads or torch.get_num_threads()
        gpu = pick_device(resources.gpus != 0).type == "cuda"
        return Settled(groups=1, workers=1, threads=threads, cpus=0.0, gpus=float(gpu))
    from cluster.training import settle

    return settle(resources, max(1, trainings), "resources.squeeze")


def _take_cached(out_uri: str, job: TeacherJob, options: SqueezeOptions) -> bool:
    """Whether the cache had the teacher, which is then the run's."""
    cached = _cached(job, options)
    return cached is not None and copy_teacher(cached, teacher_folder(out_uri, job.name))


def _cached(job: TeacherJob, options: SqueezeOptions) -> str | None:
    """Folder of a trained teacher in the cache, None where it has no place there."""
    return storage.join(options.cache, job.key) if options.cache and job.spec.weights is None else None


def _states_uri(out_uri: str) -> str:
    """Folder of the states of the trainings in progress."""
    return storage.join(out_uri, "progress", "squeeze-states")


@reproducible()
def run_jobs(arguments: dict[str, Any], indices: Iterable[int], worker: Worker) -> None:
    """Adopt or train teachers one after the other, on every worker; the images are decoded once for all.

    Args:
        arguments: plain values, see ``squeeze_teachers``.
        indices: of the jobs to do.
        worker: this process.

    Raises:
        RunError: a loss diverged; the others were trained.
    """
    out_uri, seed = arguments["out_uri"], arguments["seed"]
    jobs = [TeacherJob.model_validate(job) for job in arguments["jobs"]]
    options = SqueezeOptions.model_validate(arguments["options"])
    data = DataSpec(**arguments["data"])
    train, val = load_dataset(arguments["train_uri"], "data.train"), load_dataset(arguments["val_uri"], "data.val")
    real = RealImages(train, data, rank=worker.rank, world=worker.world)
    real_val = RealImages(val, data, rank=worker.rank, world=worker.world)
    diverged: list[Diverged] = []
    for job in (jobs[index] for index in indices):
        # A worker group that was restarted finds the teachers it had finished.
        if read_card(teacher_folder(out_uri, job.name)) is not None:
            continue
        writer = ProgressWriter(storage.join(out_uri, "progress", "squeeze"), job.name)

        def say(epochs: int, message: str, job: TeacherJob = job, writer: ProgressWriter = writer) -> None:
            if worker.rank == 0:
                writer.update(epochs, job.steps, f"{job.name} {message}", force=True, **worker.share)

        if job.spec.weights is not None:
            adopt(out_uri, job, data, train, val, worker)
            say(1, "taken over")
        else:
            try:
                train_teacher(out_uri, job, data, (real, real_val), train, options, seed, worker, say)
            except Diverged as error:
                diverged.append(error)
    if diverged:
        raise diverged[0]


def adopt(out_uri: str, job: TeacherJob, data: DataSpec, train: Dataset, val: Dataset, worker: Worker) -> None:
    """Load, check and measure given weights, and copy them into the run under the architecture's own names.

    Raises:
        UserError: the weights do not fit, or are no better than guessing.
    """
    if worker.rank == 0:
        teacher = load_teacher(job.name, job.spec, data, worker.device)
        found = top1(teacher, val, worker.device, GIVEN_VAL_IMAGES)
        _refuse_guessing(job.name, found, data.num_classes)
        commit(out_uri, job, teacher, top1(teacher, train, worker.device, TRAIN_IMAGES), found)


def _refuse_guessing(name: str, found: Accuracy, num_classes: int) -> None:
    """Classes, normalisation or weights of a given teacher that guesses are not what the data needs.

    Raises:
        UserError: its accuracy cannot be told from chance.
    """
    if guesses(found.top1, found.images, num_classes):
        raise UserError(
            f"teachers.{name}: top-1 on the validation data is {100 * found.top1:.1f} %, no better than guessing "
            f"({100 / num_classes:.1f} %); check its weights, mean and std, input_size and the order of its classes, "
            "and run with another out"
        )


def train_teacher(
    out_uri: str,
    job: TeacherJob,
    data: DataSpec,
    images: tuple[RealImages, RealImages],
    train: Dataset,
    options: SqueezeOptions,
    seed: int,
    worker: Worker,
    say: Callable[[int, str], None],
) -> Teacher:
    """Train one teacher from where it was left, commit it and put it into the cache.

    Args:
        out_uri: the run directory.
        job: of the teacher.
        data: the space of the images.
        images: training and validation images.
        train: the training images' dataset.
        options: of the training.
        seed: of the run.
        worker: this process.
        say: told (finished epochs, message).

    Raises:
        RunError: the loss diverged.
    """
    teacher = fresh_teacher(job.name, job.spec, data, derive_seed(seed, "teacher", job.name))
    training = TeacherTraining(teacher, options, job.epochs, job.lr, seed, worker)
    state_uri = storage.join(_states_uri(out_uri), f"{job.name}.pt")
    state = _load_state(state_uri, job, training.device)
    if state:
        training.restore(state)
    say(training.epoch, f"epoch {training.epoch}/{job.epochs}")
    for _ in train_epochs(training, *images):
        if worker.rank == 0:
            storage.write_bytes(state_uri, _pack(training, job))
        say(training.epoch, f"epoch {training.epoch}/{job.epochs} val {100 * training.accuracies[-1]:.1f} %")
    if worker.rank == 0:
        val_images = images[1].dataset.num_images
        right = training.accuracies[-1]
        measured = top1(teacher, train, training.device, TRAIN_IMAGES)
        commit(out_uri, job, teacher, measured, Accuracy(right, right, val_images))
        cached = _cached(job, options)
        if cached:
            copy_teacher(teacher_folder(out_uri, job.name), cached)
    return teacher


def _pack(training: TeacherTraining, job: TeacherJob) -> bytes:
    buffer = io.BytesIO()
    torch.save({**training.state(), "key": job.key}, buffer)
    return buffer.getvalue()


def _load_state(uri: str, job: TeacherJob, device: torch.device) -> dict[str, Any] | None:
    """The state of an interrupted training; None where there is none, or it is of another one of this name."""
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    return state if state["key"] == job.key else None
