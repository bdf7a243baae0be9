"""Rungs on some of the data's classes: which they are, and the datasets of them alone.

``OUT/train`` and ``OUT/val`` hold the search's images of the chosen classes, in the data's order and as they are; the
classes are numbered anew, in the data's order too. Channels, size, mean and deviation stay those of the whole data, so
that images look to the teachers, which know all classes, as they do at other rungs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cluster import rng, shards, storage
from cluster.ledger import content_key
from cluster.resources import ActorResources
from cluster.runner import Runner
from pipeline.config import DataConfig
from pipeline.search.cut import Target, copy_attempts, copy_shards
from pipeline.search.split import TRAIN, VAL
from stages.importing.select import select_packed, select_stage


def draw_classes(num_classes: int, count: int, seed: int) -> list[int]:
    """Labels of ``count`` of the data's classes, ascending; fewer of the same seed are a part of more.

    Args:
        num_classes: of the data.
        count: how many.
        seed: of the run.
    """
    order = rng.generator(seed, "search-classes").permutation(num_classes)
    return sorted(order[:count].tolist())


def cut_classes(
    data: DataConfig, out_uri: str, count: int, seed: int, runner: Runner, resources: ActorResources
) -> DataConfig:
    """Make the datasets ``OUT/train`` and ``OUT/val`` of ``count`` classes; resumes as ``split_dataset`` does.

    Args:
        data: of all classes: the two datasets of the search.
        out_uri: folder to fill, local or ``s3://``.
        count: classes.
        seed: of the run.
        runner: serial or Ray.
        resources: of the actor pool; its GPUs are left to others.

    Returns:
        The same with the two new datasets.

    Raises:
        RunError: a shard could not be made; the same call resumes.
    """
    out = storage.absolute(out_uri)
    for name, uri in {TRAIN: data.train, VAL: data.val}.items():
        assert uri is not None, "the search's data are there"
        source = shards.load_dataset(storage.absolute(uri))
        classes = draw_classes(len(source.class_names), count, seed)
        with Target(out, name, content_key(source.fingerprint, classes)) as target:
            if target.is_complete():
                continue
            masks = [np.isin(column, classes) for column in shards.labels_of(source)]
            # Packed, for a shard of few classes would be a small file for each of the source's.
            target.open(select_packed(name, masks, max(rows for _, rows in source.shards)))
            attempts = copy_attempts(storage.join(out, "starts"), target.content, seed)
            stage = select_stage(source.uri, out, target.content, resources, attempts, classes)
            copy_shards(f"{count} classes", {name: target}, runner, stage)
            attempts.clear()
            target.close(
                replace(
                    source,
                    class_names=[source.class_names[label] for label in classes],
                    class_counts=[source.class_counts[label] for label in classes],
                )
            )
    # What the user says of the classes is said of all.
    of_these = {
        "train": storage.join(out, TRAIN),
        "val": storage.join(out, VAL),
        "num_classes": None,
        "class_names": None,
    }
    return data.model_copy(update=of_these)
