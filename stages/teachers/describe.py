"""What a network is, without weights, memory or time: built and run on torch's meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cluster.errors import UserError, first_line
from stages.teachers.build import bn_layers, build_network
from stages.teachers.options import NetworkSpec


@dataclass(frozen=True)
class NetworkFacts:
    """Facts of an architecture at an input size.

    Attributes:
        flops: floating-point operations of one forward pass of one image (two per multiply-add).
        parameters: trainable parameters.
        bn_channels: channels of every BatchNorm2d layer with running statistics, in ``modules()`` order.
        bn_elements: of the inputs of all of them together, for one image.
        bn_repeated: names of those that run more than once in a forward pass, whose statistics nothing can match.
    """

    flops: float
    parameters: int
    bn_channels: list[int]
    bn_elements: int
    bn_repeated: list[str]


def describe_network(
    spec: NetworkSpec, *, num_classes: int, channels: int, image_size: int, field: str
) -> NetworkFacts:
    """Facts of a network, and proof that it takes the images and answers with the classes.

    Args:
        spec: architecture.
        num_classes: outputs it must have.
        channels: of its input.
        image_size: of its input.
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
    layers = bn_layers(network)
    runs: dict[nn.Module, int] = dict.fromkeys(layers, 0)
    images, elements = 2, 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal elements
        runs[layer] += 1
        elements += inputs[0].numel() // images

    for layer in layers:
        layer.register_forward_pre_hook(count)
    try:
        with torch.no_grad(), counter:
            logits = network(torch.zeros(images, channels, image_size, image_size, device="meta"))
    except Exception as error:
        raise UserError(
            f"{field}: {spec.arch} does not accept {channels}×{image_size}×{image_size} images ({first_line(error)}); "
            "choose another architecture, its kwargs, or input_size"
        ) from None
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{field}: {spec.arch} returned a {type(logits).__name__}; its factory must return a network that gives "
            "logits [B, classes]"
        )
    if tuple(logits.shape) != (images, num_classes):
        raise UserError(
            f"{field}: {spec.arch} gives {tuple(logits.shape)[1:]} outputs an image, but {num_classes} classes are "
            "expected; set num_outputs and class_index to use a network that knows more classes"
        )
    return NetworkFacts(
        flops=counter.get_total_flops() / images,
        parameters=sum(p.numel() for p in network.parameters()),
        bn_channels=[layer.num_features for layer in layers],
        bn_elements=elements,
        bn_repeated=[name for name, layer in network.named_modules() if runs.get(layer, 0) > 1],
    )
