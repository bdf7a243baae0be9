"""Training one student from scratch on images and stored labels, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster.errors import RunError, UserError
from cluster.rng import derive_seed
from cluster.worker import Worker
from stages.data import DataSpec
from stages.device import autocast, moved, reproducible
from stages.evaluate.losses import student_loss
from stages.evaluate.options import Protocol
from stages.evaluate.schedules import lr_multiplier
from stages.imageset import ImageSet
from stages.relabel.store import EpochLabels
from stages.teachers.build import build_network, memory_format
from stages.teachers.options import NetworkSpec
from stages.training import make_optimizer

ReadEpoch = Callable[[int], EpochLabels]
"""Epoch (from 0) to its views and logits."""


def new_student(name: str, spec: NetworkSpec, data: DataSpec, seed: int) -> nn.Module:
    """A student with the initial weights of (name, seed), the same for every method it is trained for."""
    return build_network(spec, data.num_classes, data.channels, derive_seed(seed, "student", name))


def batch_slices(count: int, batch: int, world: int = 1) -> list[slice]:
    """Positions of an epoch cut into batches, in order.

    The last one may be smaller; it is left out only where a worker would get a single image or none, on which
    BatchNorm has no variance.
    """
    slices = [slice(start, min(start + batch, count)) for start in range(0, count, batch)]
    return [s for s in slices if s.stop - s.start >= 2 * world]


class StudentTraining:
    """A student in training; ``train_student`` drives it epoch by epoch.

    Args:
        network: initial student, on any device.
        images: all N images.
        protocol: how to train.
        data: normalisation.
        epochs: in all; label epoch e is read in training epoch e.
        seed: of what the network itself draws (dropout), epoch by epoch.
        worker: this process; every worker takes its share of each batch.

    Attributes:
        epoch: finished epochs.
        losses: mean training loss of each.

    Raises:
        UserError: ``protocol.batch`` is too small for the workers.
    """

    def __init__(
        self,
        network: nn.Module,
        images: ImageSet,
        protocol: Protocol,
        data: DataSpec,
        epochs: int,
        seed: int,
        worker: Worker,
    ):
        self.protocol, self.data, self.epochs, self.seed = protocol, data, epochs, seed
        self.device, self.rank, self.world = torch.device(worker.device), worker.rank, worker.world
        self.images, self.labels = images.images_near(self.device), images.labels
        self.slices = batch_slices(len(images), protocol.batch, self.world)
        if not self.slices:
            raise UserError(
                f"evaluate.protocol.batch: {min(protocol.batch, len(images))} images are "
                f"less than two for each of {self.world} workers; raise it or lower resources.evaluate.workers"
            )
        self._layout = memory_format(network)
        self.network = network.to(device=self.device, memory_format=self._layout)  # type: ignore[call-overload]
        self.model = worker.wrap(self.network)
        self.optimizer = make_optimizer(
            self.network, protocol.optimizer, protocol.lr, protocol.weight_decay, protocol.momentum
        )
        # EMA of parameters alone; the averaged weights are evaluated with the current BN statistics (EDC).
        averaged = self.network.named_parameters() if protocol.ema is not None else ()
        self.average = {name: p.detach().clone() for name, p in averaged}
        self.epoch = 0
        self.losses: list[float] = []

    def train_epoch(self, labels: EpochLabels) -> float:
        """One pass over the images, in the stored order.

        Returns:
            The mean loss over the epoch's images.

        Raises:
            RunError: the labels are not of these images, or the loss is no longer finite.
        """
        if len(labels.order) != len(self.labels):
            raise RunError(
                f"there are {len(self.labels)} images but labels of {len(labels.order)}; run the relabel stage again"
            )
        self.model.train()
        total = torch.zeros((), device=self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with reproducible(self.protocol.precision), torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed(self.seed, "student_epoch", self.epoch, self.rank))
            for index, batch in enumerate(self.slices):
                progress = (self.epoch + index / len(self.slices)) / self.epochs
                total += self._step(labels, batch, progress)
        if self.world > 1:
            torch.distributed.all_reduce(total)
        loss = total.item() / sum(s.stop - s.start for s in self.slices)
        if not math.isfinite(loss):
            raise RunError(
                f"the loss became {loss} in epoch {self.epoch + 1}; lower evaluate.protocol.lr "
                f"(now {self.protocol.lr}) and run again"
            )
        self.epoch += 1
        self.losses.append(loss)
        return loss

    def _step(self, labels: EpochLabels, batch: slice, progress: float) -> Tensor:
        """One optimiser step on this worker's share of a batch; returns its summed loss."""
        positions = np.arange(batch.start, batch.stop)[self.rank :: self.world]
        ids = labels.order[positions]
        partners = labels.views.partner[ids]
        lr = self.protocol.lr * lr_multiplier(self.protocol, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x = labels.render(self.images, positions, self.data, self.device).contiguous(memory_format=self._layout)
        with autocast(self.device, self.protocol.precision):
            logits = self.model(x)
        loss = student_loss(
            self.protocol,
            logits.float(),
            moved(torch.from_numpy(labels.logits[positions]), self.device).float(),
            moved(self.labels[ids], self.device),
            moved(self.labels[partners], self.device),
            moved(torch.from_numpy(labels.views.lam[ids]), self.device),
        )
        self.optimizer.zero_grad(set_to_none=True)
        # Workers' gradients are averaged evenly, their shares may differ by one image.
        (loss * (len(ids) * self.world / (batch.stop - batch.start))).backward()
        self.optimizer.step()
        if self.protocol.ema is not None:
            parameters = [p.detach() for p in self.network.parameters()]
            torch._foreach_lerp_(list(self.average.values()), parameters, 1 - self.protocol.ema)
        return loss.detach() * len(ids)

    def weights(self) -> dict[str, Tensor]:
        """What is evaluated: the state dict, with averaged parameters where EMA is on."""
        return {**self.network.state_dict(), **self.average}

    def state(self) -> dict[str, Any]:
        """All that ``restore`` needs to go on with the same numbers; readable with ``weights_only``."""
        return {
            "epoch": self.epoch,
            "losses": self.losses,
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``."""
        self.epoch, self.losses = state["epoch"], list(state["losses"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in self.average.items():
            value.copy_(state["average"][name])


def train_student(training: StudentTraining, read_epoch: ReadEpoch) -> Iterator[StudentTraining]:
    """Train to the end, from wherever ``training`` stands; yields it after each epoch.

    Args:
        training: new or restored.
        read_epoch: labels of an epoch (from 0).
    """
    while training.epoch < training.epochs:
        training.train_epoch(read_epoch(training.epoch))
        yield training
