"""Networks without shortcuts: ConvNet (Gidaris & Komodakis, CVPR 2018) and VGG (Simonyan & Zisserman, ICLR 2015)."""

from __future__ import annotations

from torch import nn

from stages.teachers.networks.parts import Classifier, conv_bn


def convnet_d3(num_classes: int, in_chans: int = 3, width: int = 128, depth: int = 3) -> nn.Module:
    """ConvNet-D3: three times 3×3 convolution, BatchNorm, ReLU, 2×2 average pooling.

    The literature flattens the last 4×4 map into the head; here it is averaged, so that one network takes every
    image size.
    """
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [
            conv_bn(width if index else in_chans, width, 3),
            nn.ReLU(),
            nn.AvgPool2d(2, ceil_mode=True),
        ]
    return Classifier(nn.Sequential(*layers), width, num_classes)


def vgg_bn(num_classes: int, in_chans: int = 3, width: int = 64) -> nn.Module:
    """VGG-11's eight convolutions with BatchNorm: ``width`` × 1 | 2 | 4, 4 | 8, 8 | 8, 8, max-pooling at the bars."""
    layers: list[nn.Module] = []
    channels = in_chans
    for stage in ((1,), (2,), (4, 4), (8, 8), (8, 8)):
        if layers:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        for multiple in stage:
            layers += [conv_bn(channels, width * multiple, 3), nn.ReLU()]
            channels = width * multiple
    return Classifier(nn.Sequential(*layers), channels, num_classes)
