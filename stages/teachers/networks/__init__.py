"""Built-in BatchNorm networks for images of 28–64 px, of families that differ (``arch: builtin:NAME``).

Every factory takes ``num_classes``, ``in_chans`` and what scales it (``width``, ``width_mult``, ``widen``).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from stages.teachers.networks.mobile import mobilenetv2, shufflenetv2
from stages.teachers.networks.plain import convnet_d3, vgg_bn
from stages.teachers.networks.resnet import resnet10, resnet18, resnet34, wrn16_2

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (resnet10, resnet18, resnet34, convnet_d3, vgg_bn, mobilenetv2, shufflenetv2, wrn16_2)
}
