"""Supervised training of one teacher, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import RunError
from cluster.rng import derive_seed, generator
from cluster.worker import Worker
from stages.device import autocast
from stages.squeeze.augment import augmented
from stages.squeeze.data import RealImages
from stages.squeeze.options import SqueezeOptions
from stages.teachers.accuracy import count_right
from stages.teachers.build import memory_format
from stages.teachers.teacher import Teacher
from stages.training import make_optimizer


class Diverged(RunError):
    """The loss of a teacher is no longer finite, on all workers."""


class TeacherTraining:
    """A teacher in training; ``train_epochs`` drives it.

    Every number is a function of (seed, teacher's name, epoch, workers), so that a training which is restored
    from ``state()`` ends with the same weights as one that was never stopped.

    Args:
        teacher: fresh, on any device; its network is trained.
        options: how.
        epochs, lr: of this teacher.
        seed: of the order of the images and of augmentation.
        worker: this process.

    Attributes:
        epoch: finished epochs.
        losses: mean training loss of each.
        accuracies: top-1 on the validation data after each.
    """

    def __init__(self, teacher: Teacher, options: SqueezeOptions, epochs: int, lr: float, seed: int, worker: Worker):
        self.options, self.epochs, self.lr = options, epochs, lr
        self.device, self.rank, self.world = torch.device(worker.device), worker.rank, worker.world
        self.seed = derive_seed(seed, "squeeze", teacher.name)
        self.teacher = teacher.to(self.device)
        self.network = teacher.network.requires_grad_(True)
        self._layout = memory_format(self.network)
        self.network.to(memory_format=self._layout)  # type: ignore[call-overload]
        self.model = worker.wrap(self.network)
        self.optimizer = make_optimizer(
            self.network, options.optimizer, lr, options.weight_decay, options.momentum, nesterov=options.momentum > 0
        )
        auto = "bf16" if self.device.type == "cuda" else "fp32"
        self._autocast = autocast(self.device, auto if options.precision == "auto" else options.precision)
        self.epoch = 0
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def train_epoch(self, images: RealImages) -> None:
        """One pass over the training images.

        Raises:
            Diverged: the loss is no longer finite.
        """
        self.network.train()
        count = images.num_batches(self.options.batch, self.seed, self.epoch)
        total, seen = torch.zeros((), device=self.device), 0
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            # What the network itself draws (dropout).
            torch.manual_seed(derive_seed(self.seed, "network", self.epoch, self.rank))
            for index, (pixels, labels) in enumerate(images.batches(self.options.batch, self.seed, self.epoch)):
                rng = generator(self.seed, "augment", self.epoch, index, self.rank)
                total += self._step(pixels, labels, rng, (self.epoch + index / count), count) * len(labels)
                seen += len(labels)
        self.network.eval()
        loss = (self._sum(total) / self._sum(torch.tensor(float(seen), device=self.device))).item()
        if not math.isfinite(loss):
            raise Diverged(
                f"teachers.{self.teacher.name}: the loss became {loss} in epoch {self.epoch + 1}; lower squeeze.lr or "
                f"teachers.{self.teacher.name}.lr (now {self.lr:g}) and run with another out"
            )
        self.losses.append(loss)
        self.epoch += 1
        self._align_optimizer()

    def _step(self, pixels: Tensor, labels: Tensor, rng: Any, position: float, per_epoch: int) -> Tensor:
        """One optimiser step; returns its loss."""
        lr = self.lr * lr_multiplier(position, 1 / per_epoch, self.options.warmup_epochs, self.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x = augmented(pixels.to(self.device), rng, self.options, self.teacher.data)
        x = self.teacher.prepare(x).contiguous(memory_format=self._layout)
        with self._autocast:
            loss = F.cross_entropy(self.model(x), labels.to(self.device), label_smoothing=self.options.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def validate(self, images: RealImages) -> float:
        """Top-1 on all images, which is kept in ``accuracies``."""
        right = total = 0
        for pixels, labels in images.parts():
            right += count_right(self.teacher, pixels, labels, self.device)[0]
            total += len(labels)
        counts = self._sum(torch.tensor([right, total], dtype=torch.float64, device=self.device)).tolist()
        self.accuracies.append(counts[0] / counts[1])
        return self.accuracies[-1]

    def _sum(self, value: Tensor) -> Tensor:
        """Sum over the workers."""
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value

    def _align_optimizer(self) -> None:
        """Lay the optimiser's tensors out like the weights.

        Files keep numbers, not layouts; and a layout decides which kernel adds, hence the last bit of a sum.
        """
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                    values[key] = torch.empty_like(parameter).copy_(value)

    def state(self) -> dict[str, Any]:
        """All that ``restore`` needs; ``torch.load(weights_only=True)`` reads it."""
        return {
            "epoch": self.epoch,
            "losses": self.losses,
            "accuracies": self.accuracies,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``."""
        self.epoch = state["epoch"]
        self.losses, self.accuracies = list(state["losses"]), list(state["accuracies"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._align_optimizer()


def train_epochs(training: TeacherTraining, train: RealImages, val: RealImages) -> Iterator[TeacherTraining]:
    """Train to the end, from wherever ``training`` stands; yields it, validated, after each epoch."""
    while training.epoch < training.epochs:
        training.train_epoch(train)
        training.validate(val)
        yield training


def lr_multiplier(position: float, step: float, warmup: float, epochs: int) -> float:
    """Linear warm-up, then cosine to 0.

    Args:
        position: epochs done before this step (fractional).
        step: length of a step in epochs.
        warmup: epochs; at most half of all are spent on it.
        epochs: in all.
    """
    warmup = min(warmup, epochs / 2)
    if position < warmup:
        return min(1.0, (position + step) / warmup)
    return 0.5 * (1 + math.cos(math.pi * (position - warmup) / (epochs - warmup)))
