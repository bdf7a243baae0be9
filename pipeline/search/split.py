"""The search split: images of every class, cut out of the training data, on which trials are measured.

``OUT/train`` holds the training images without the split, a shard for each of the data's that had any left; ``OUT/val``
holds the split, in shards of as many images as the data's largest, since every student of every trial reads it. Both
are datasets as an import makes them, with the images in the data's order. Channels, size, mean and deviation in both
``dataset.json`` are those of the whole training data, so that images look to the networks of a search exactly as they
do to those of a full run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cluster import shards, storage
from cluster.classes import ClassIndex
from cluster.errors import UserError
from cluster.ledger import content_key
from cluster.resources import ActorResources
from cluster.runner import Runner
from cluster.shards import Dataset
from pipeline.search.cut import Target, copy_attempts, copy_shards
from stages.importing.run import check_unused
from stages.importing.select import Selection, select_packed, select_per_shard, select_stage

TRAIN, VAL = "train", "val"
SPLIT_FILE = "split.json"


def check_split(train: Dataset, per_class: int, need: int = 1) -> None:
    """Every class has images enough for the split and for what is made from the others.

    Args:
        train: training data.
        per_class: images of each class in the split.
        need: images of a class that recovery and the baselines start from, at least one.

    Raises:
        UserError: names the class with the fewest.
    """
    count, name = min(zip(train.class_counts, train.class_names, strict=True))
    if count < per_class + need:
        raise UserError(
            f"data.train: class {name!r} has {count} images, but {per_class} for the search split and {need} for "
            "recovery and baselines are needed; lower search.split.per_class or recover.ipc"
        )


def plan_split(
    labels: Sequence[NDArray[np.int64]], num_classes: int, per_class: int, seed: int, size: int
) -> list[Selection]:
    """Which images go where: a function of the labels in the data's order, ``per_class`` and ``seed``.

    Args:
        labels: of every shard in row order.
        num_classes: of the data.
        per_class: images of each class in the split.
        seed: of the run.
        size: images of a shard of the split.

    Returns:
        Shards of the split, each of which takes longest, then those of the rest.
    """
    images = ClassIndex(labels, num_classes)
    taken = [np.zeros(len(column), bool) for column in labels]
    for label in range(num_classes):
        for shard, row in images.draw(label, per_class, seed, "search-split"):
            taken[shard][row] = True
    return [*select_packed(VAL, taken, size), *select_per_shard(TRAIN, [~mask for mask in taken])]


def split_dataset(
    train: Dataset,
    out_uri: str,
    per_class: int,
    seed: int,
    runner: Runner,
    resources: ActorResources,
    need: int = 1,
) -> tuple[str, str]:
    """Make the datasets ``OUT/train`` and ``OUT/val``.

    What an interrupted call has finished is kept. A finished split is left alone, known from one listing a dataset;
    shards that were lost or cut short since are made again. A split of other data, another size or seed gives way.
    Neither dataset can be loaded before it is whole.

    Args:
        train: training data.
        out_uri: folder to fill, local or ``s3://``.
        per_class: images of each class in the split.
        seed: of the run.
        runner: serial or Ray.
        resources: of the actor pool; its GPUs are left to others.
        need: see ``check_split``.

    Returns:
        The folders of the two.

    Raises:
        UserError: a class has too few images, OUT holds files of something else, or the data contradict their
            description.
        RunError: a shard could not be made; the same call resumes.
    """
    check_split(train, per_class, need)
    # Workers may have another working directory.
    out, source = storage.absolute(out_uri), storage.absolute(train.uri)
    content = content_key(train.fingerprint, train.class_names, train.shards, per_class, seed)
    _check_own(out, source)
    with ExitStack() as stack:
        # Shards of the split take longest.
        targets = {name: stack.enter_context(Target(out, name, content)) for name in (VAL, TRAIN)}
        if not all(target.is_complete() for target in targets.values()):
            size = max(rows for _, rows in train.shards)
            selections = plan_split(_labels(train), len(train.class_names), per_class, seed, size)
            for target in targets.values():
                target.open([each for each in selections if each.folder == target.name])
            inputs = {"content": content, "train": source, "per_class": per_class, "seed": seed}
            storage.write_json(storage.join(out, SPLIT_FILE), inputs)
            attempts = copy_attempts(storage.join(out, "starts"), content, seed)
            copy_shards("split", targets, runner, select_stage(source, out, content, resources, attempts))
            attempts.clear()
            left = [count - per_class for count in train.class_counts]
            targets[TRAIN].close(replace(train, class_counts=left))
            targets[VAL].close(replace(train, class_counts=[per_class] * len(train.class_names)))
        return targets[TRAIN].uri, targets[VAL].uri


def _labels(train: Dataset) -> list[NDArray[np.int64]]:
    """Labels of every shard.

    Raises:
        UserError: they are not those that ``dataset.json`` counts.
    """
    labels = shards.labels_of(train)
    counts = np.bincount(np.concatenate(labels), minlength=len(train.class_names))
    if counts.tolist() != train.class_counts:
        raise UserError(f"data.train: {train.uri} has other labels than its {shards.DATASET_FILE}; import it again")
    return labels


def _check_own(out: str, source: str) -> None:
    """The folder is empty or an earlier call's.

    Raises:
        UserError: it holds something else.
    """
    if f"{source}/".startswith(f"{out.rstrip('/')}/"):
        raise UserError(f"out: {out} holds the training data ({source}); choose another folder")
    where = storage.join(out, SPLIT_FILE)
    try:
        storage.read_json(where)
    except FileNotFoundError:
        check_unused(out, "out")
    except ValueError:
        raise UserError(f"out: {where} is damaged; delete {out}") from None
