"""How alike the images of a class are: cosine similarity of their features (PRISM Figure 4, DELT)."""

from __future__ import annotations

import json
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


def features(teacher: Teacher, images: ImageSet, data: DataSpec, batch: int = 100) -> NDArray[np.float64]:
    """Penultimate features: what goes into the teacher's classifier, averaged over positions if it has any.

    Returns:
        float64 [N, D].
    """
    device = next(teacher.parameters()).device
    out: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        out.append((x.flatten(2).mean(2) if x.ndim == 4 else x.flatten(1)).double().cpu())

    handle = classifier_of(teacher.network).register_forward_pre_hook(keep)
    try:
        with torch.inference_mode():
            for start in range(0, len(images), batch):
                teacher(data.normalise(images.images[start : start + batch].to(device)))
    finally:
        handle.remove()
    return torch.cat(out).numpy()


def class_cosine(values: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, Any]:
    """Cosine similarity over all pairs of images of the same class.

    Args:
        values: features [N, D].
        labels: [N].

    Returns:
        ``cosine_mean`` and ``cosine_std`` (population) over the pairs of all classes, ``per_class``: mean of
        each class in label order. None where there is no pair.
    """
    unit = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    pairs = []
    for label in range(int(labels.max()) + 1):
        members = unit[labels == label]
        upper = np.triu_indices(len(members), k=1)
        pairs.append((members @ members.T)[upper])
    every = np.concatenate(pairs)
    return {
        "cosine_mean": float(every.mean()) if len(every) else None,
        "cosine_std": float(every.std()) if len(every) else None,
        "per_class": [float(p.mean()) if len(p) else None for p in pairs],
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
        result = class_cosine(features(self.teacher, images, self.data), images.labels.numpy())
        return {"id": row["id"], "error": "", "result": json.dumps(result)}


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
