"""What a network is, without weights, memory or time: built and run on torch's meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cluster.errors import UserError
from stages.teachers.build import build_network
from stages.teachers.options import NetworkSpec


@dataclass(frozen=True)
class NetworkFacts:
    """Facts of an architecture at an input size.

    Attributes:
        flops: floating-point operations of one forward pass of one image (two per multiply-add).
        parameters: trainable parameters.
        bn_channels: channels of every BatchNorm2d layer, in ``modules()`` order.
    """

    flops: float
    parameters: int
    bn_channels: list[int]


def describe_network(
    spec: NetworkSpec, *, num_classes: int, channels: int, image_size: int, field: str
) -> NetworkFacts:
    """Facts of a network, and proof that it takes the images and answers with the classes.

    Args:
        spec: architecture.
        num_classes: outputs it must have.
        channels, image_size: of its input.
        field: of the configuration, for messages.

    Raises:
        UserError: the architecture does not exist, cannot take images of that size, or has other outputs.
    """
    try:
        with torch.device("meta"):
            network = build_network(spec, num_classes, channels)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    except Exception:
        # A user's factory may compute with values while it builds, which meta tensors do not have.
        network = build_network(spec, num_classes, channels).to("meta")
    network.eval()
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            logits = network(torch.zeros(2, channels, image_size, image_size, device="meta"))
    except Exception as error:
        raise UserError(
            f"{field}: {spec.arch} does not accept {channels}×{image_size}×{image_size} images ({_first_line(error)}); "
            "choose another architecture, its kwargs, or input_size"
        ) from None
    if tuple(logits.shape) != (2, num_classes):
        raise UserError(
            f"{field}: {spec.arch} gives {tuple(logits.shape)[1:]} outputs an image, but {num_classes} classes are expected; "
            "set num_outputs and class_index to use a network that knows more classes"
        )
    return NetworkFacts(
        flops=counter.get_total_flops() / 2,
        parameters=sum(p.numel() for p in network.parameters()),
        bn_channels=[m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d)],
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160] or type(error).__name__
