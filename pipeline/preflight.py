"""Everything that can be known to fail, found in seconds and said in words before any work starts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from cluster import storage
from cluster.errors import UserError, some
from cluster.shards import Dataset, load_dataset
from pipeline import rundir
from pipeline.config import Config
from stages.data import DataSpec
from stages.evaluate.jobs import student_id
from stages.squeeze.augment import check_squeeze
from stages.squeeze.stage import check_teachers
from stages.teachers.card import CARD_FILE
from stages.teachers.describe import NetworkFacts, describe_network
from stages.teachers.teacher import load_teacher


@dataclass(frozen=True)
class Ready:
    """What the checks found out.

    Attributes:
        train, val: the real data.
        data: the common image space.
        networks: teacher → facts of its architecture.
        students: the same of the students.
    """

    train: Dataset
    val: Dataset
    data: DataSpec
    networks: dict[str, NetworkFacts]
    students: dict[str, NetworkFacts]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the data."""
        return {"train": self.train.fingerprint, "val": self.val.fingerprint}


def check_networks(config: Config, num_classes: int) -> dict[str, NetworkFacts]:
    """Architectures exist, accept the images, and BN teachers have BatchNorm.

    Raises:
        UserError: names the teacher.
    """
    data = config.data
    facts = {
        name: describe_network(
            spec,
            num_classes=spec.num_outputs or num_classes,
            channels=data.channels,
            image_size=spec.input_size or data.image_size,
            field=f"teachers.{name}",
        )
        for name, spec in config.teachers.items()
    }
    if not config.recover.allow_null_bn:
        for name in config.recover.bn_teachers:
            if not facts[name].bn_channels:
                raise UserError(
                    f"recover.bn_teachers: {name} ({config.teachers[name].arch}) has no BatchNorm layer, so it cannot "
                    "give a BN loss; take it out of the list (recover.allow_null_bn: true reproduces the published "
                    "arithmetic)"
                )
    for name in config.recover.bn_teachers:
        if facts[name].bn_repeated:
            raise UserError(
                f"recover.bn_teachers: {name} runs its BatchNorm layer {facts[name].bn_repeated[0]} more than once in "
                "a forward pass, so there are no statistics to match; take it out of the list"
            )
    return facts


def check_students(config: Config, num_classes: int) -> dict[str, NetworkFacts]:
    """Student architectures exist and accept the images.

    Raises:
        UserError: names the student.
    """
    return {
        name: describe_network(
            student,
            num_classes=num_classes,
            channels=config.data.channels,
            image_size=config.data.image_size,
            field=f"evaluate.students.{name}",
        )
        for name, student in config.evaluate.students.items()
    }


def _open(uri: str | None, field: str) -> Dataset:
    if uri is None:
        raise UserError(f"{field}: is not given; `prism import SRC DST` makes DST/train and DST/val from your images")
    return load_dataset(uri, field)


def check_data(config: Config) -> tuple[Dataset, Dataset, DataSpec]:
    """Data is there, agrees with itself and with the configuration, and suffices for the IPC.

    Raises:
        UserError: names the field.
    """
    wanted = config.data
    train, val = _open(wanted.train, "data.train"), _open(wanted.val, "data.val")
    if train.class_names != val.class_names:
        raise UserError(
            f"data.val: its classes [{some(val.class_names)}] are not those of data.train "
            f"[{some(train.class_names)}] in the same order; import both splits together"
        )
    if wanted.class_names is not None and wanted.class_names != train.class_names:
        raise UserError(
            f"data.class_names: [{some(wanted.class_names)}] is not the data's class order "
            f"[{some(train.class_names)}]; correct or remove the field"
        )
    if wanted.num_classes is not None and wanted.num_classes != len(train.class_names):
        raise UserError(
            f"data.num_classes: {wanted.num_classes} is given, but data.train has {len(train.class_names)} classes"
        )
    if wanted.channels == 1 and train.channels == 3:
        raise UserError("data.channels: 1 is given, but the images are in colour; set it to 3")
    ipc = config.recover.ipc
    needs_real = config.recover.init == "real" or "random_real" in config.evaluate.baselines
    if needs_real and min(train.class_counts) < ipc:
        index = train.class_counts.index(min(train.class_counts))
        raise UserError(
            f"recover.ipc: {ipc} real images per class are needed, but class {train.class_names[index]!r} has "
            f"{train.class_counts[index]}; lower recover.ipc or use recover.init=noise without the random_real baseline"
        )
    # Grey images shown as RGB repeat their one channel.
    widen = 3 if wanted.channels == 3 and train.channels == 1 else 1
    spec = DataSpec(
        image_size=wanted.image_size,
        channels=wanted.channels,
        mean=tuple(wanted.mean or train.mean * widen),
        std=tuple(wanted.std or train.std * widen),
        class_names=tuple(train.class_names),
        resize=wanted.resize,
    )
    return train, val, spec


def check_weights(config: Config, data: DataSpec) -> None:
    """Given weights are there, load as plain tensors, and fit their architecture and the data's classes.

    Raises:
        UserError: names the teacher.
    """
    for name, spec in config.teachers.items():
        if spec.weights is not None and not storage.exists(storage.join(config.out, "teachers", name, CARD_FILE)):
            load_teacher(name, spec, data)


def weight_bytes(config: Config, students: dict[str, NetworkFacts]) -> int:
    """Bytes that are still to be written of the students' weights, which wait for validation at every validated epoch.

    A student with a result counts as done, whatever it was made from: too little is better than to refuse a run that
    has everything.
    """
    evaluate = config.evaluate
    states = -(-config.relabel.epochs // evaluate.protocol.val_every)
    total = 0
    for method, (name, facts), seed in itertools.product(
        [config.recipe, *evaluate.baselines], students.items(), evaluate.seeds
    ):
        job = student_id(method, name, evaluate.protocol.name, seed)
        if not storage.exists(storage.join(config.out, "eval", f"{job}.json")):
            there = sum(storage.list_files(storage.join(config.out, "eval", "weights", job)).values())
            total += max(0, 4 * states * facts.parameters - there)
    return total


@dataclass(frozen=True)
class Planned:
    """Files that a run will have.

    Attributes:
        folder: below the run directory.
        files: how many.
        size: bytes of all, estimated.
    """

    folder: str
    files: int
    size: int


def check_space(config: Config, planned: list[Planned], students: dict[str, NetworkFacts]) -> None:
    """The disk of a local run directory holds what is planned and not yet written.

    Args:
        config: of the run.
        planned: images and labels.
        students: facts of their architectures.

    Raises:
        UserError: says how much is needed and free.
    """
    free = storage.free_bytes(config.out)
    if free is None:
        return
    needed = weight_bytes(config, students)
    for part in planned:
        # By number, since a finished file may well be smaller than was estimated.
        there = len(storage.list_files(storage.join(config.out, part.folder), ".parquet"))
        needed += part.size * max(0, part.files - there) // part.files
    if needed > free:
        raise UserError(
            f"out: {config.out} has {free / 2**30:.1f} GiB free, but the planned images, labels and weights take "
            f"{needed / 2**30:.1f} GiB more; choose a larger disk, fewer relabel.epochs, a larger "
            "evaluate.protocol.val_every or a smaller recover.ipc"
        )


def preflight(config: Config) -> Ready:
    """All checks that need no Ray, in seconds; nothing is written."""
    train, val, data = check_data(config)
    networks = check_networks(config, data.num_classes)
    ready = Ready(train, val, data, networks, check_students(config, data.num_classes))
    check_squeeze(config.squeeze, data)
    check_weights(config, data)
    rundir.check_owner(config, ready.fingerprints)
    check_teachers(config.out, config.teachers, data, train.fingerprint, config.squeeze, config.seed)
    storage.check_writable(config.out, "out")
    return ready
