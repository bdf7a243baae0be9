"""How alike the images of a class are: cosine similarity of their features (PRISM Figure 4, DELT)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cluster.errors import UserError
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row
from stages.data import DataSpec
from stages.device import pick_device
from stages.imageset import ImageSet, load_image_set
from stages.teachers.options import TeacherSpec
from stages.teachers.teacher import Teacher, load_teacher


def classifier_of(network: nn.Module) -> nn.Module:
    """The last layer that could be a classifier: the last Linear, else the last 1×1 convolution.

    Raises:
        UserError: there is neither.
    """
    modules = list(network.modules())
    linear = [m for m in modules if isinstance(m, nn.Linear)]
    point = [m for m in modules if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    if not linear and not point:
        raise UserError("teachers: the primary has no Linear layer or 1×1 convolution to read features at")
    return (linear or point)[-1]


def features(
    teacher: Teacher, images: ImageSet, data: DataSpec, ids: NDArray[np.int64] | None = None, batch: int = 100
) -> NDArray[np.float64]:
    """Penultimate features: what goes into the teacher's classifier, averaged over positions if it has any.

    Args:
        teacher: whose features.
        images: the set.
        data: normalisation.
        ids: n image ids. None: all.
        batch: images of a forward pass.

    Returns:
        float64 [n, D].
    """
    device = next(teacher.parameters()).device
    chosen = torch.arange(len(images)) if ids is None else torch.from_numpy(ids)
    out: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        out.append((x.flatten(2).mean(2) if x.ndim == 4 else x.flatten(1)).double().cpu())

    handle = classifier_of(teacher.network).register_forward_pre_hook(keep)
    try:
        with torch.inference_mode():
            for part in chosen.split(batch):
                teacher(data.normalise(images.images[part].to(device)))
    finally:
        handle.remove()
    return torch.cat(out).numpy()


def class_cosine(
    features_of: Callable[[NDArray[np.int64]], NDArray[np.float64]], labels: NDArray[np.int64]
) -> dict[str, Any]:
    """Cosine similarity over all pairs of images of the same class, one class in memory at a time.

    Args:
        features_of: image ids [n] → features [n, D].
        labels: [N], by image id.

    Returns:
        ``cosine_mean`` and ``cosine_std`` (population) over the pairs of all classes, ``per_class``: mean of
        each class in label order. None where there is no pair.
    """
    parts: list[tuple[int, float, float]] = []  # pairs, their mean, their summed squared distances from it
    for label in range(int(labels.max()) + 1):
        ids = np.flatnonzero(labels == label)
        values = features_of(ids) if len(ids) > 1 else np.zeros((0, 1))
        unit = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        pairs = (unit @ unit.T)[np.triu_indices(len(unit), k=1)]
        mean = float(pairs.mean()) if len(pairs) else 0.0
        parts.append((len(pairs), mean, float(((pairs - mean) ** 2).sum())))
    count = sum(n for n, _, _ in parts)
    mean = math.fsum(n * m for n, m, _ in parts) / count if count else 0.0
    # Between the classes and within them.
    squares = math.fsum(s + n * (m - mean) ** 2 for n, m, s in parts)
    return {
        "cosine_mean": mean if count else None,
        "cosine_std": math.sqrt(squares / count) if count else None,
        "per_class": [m if n else None for n, m, _ in parts],
    }


class DiversityStage:
    """Measures one folder of images per row with one teacher.

    Args:
        name: of the teacher.
        spec: with its ``weights`` set.
        data: the run's image space.
        gpu: use the actor's GPU where it has one.
    """

    def __init__(self, name: str, spec: TeacherSpec, data: DataSpec, gpu: bool):
        self.data = data
        self.teacher = load_teacher(name, spec, data, pick_device(gpu))

    def __call__(self, row: Row) -> Row:
        """``uri`` of a folder of recovered shards → ``result``, JSON of ``class_cosine``."""
        images = load_image_set(row["uri"], self.data)
        found = class_cosine(lambda ids: features(self.teacher, images, self.data, ids), images.labels.numpy())
        return {"id": row["id"], "error": "", "result": json.dumps(found)}


def diversity_stage(name: str, spec: TeacherSpec, data: DataSpec, resources: ActorResources) -> ActorStage:
    """The stage for a runner.

    Args:
        name: of the feature model.
        spec: with its ``weights`` set.
        data: the run's image space.
        resources: of the actor pool.
    """
    kwargs = {"name": name, "spec": spec, "data": data, "gpu": resources.gpus != 0}
    return ActorStage("diversity", DiversityStage, kwargs, resources)
