"""Networks of depthwise convolutions: MobileNetV2 (Sandler et al., CVPR 2018), ShuffleNetV2 (Ma et al., ECCV 2018).

Strides are those usual for 28–64 px: the stem keeps the resolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stages.teachers.networks.parts import Classifier, conv_bn


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, linear 1×1 projection; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int):
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = [conv_bn(inputs, hidden, 1), nn.ReLU6()] if expand > 1 else []
        layers += [conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(), conv_bn(hidden, outputs, 1)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] → [B, outputs, ⌈H / stride⌉, ⌈W / stride⌉]."""
        return x + self.layers(x) if self.residual else self.layers(x)


# (expansion, channels, blocks, stride) of each stage: table 2 of the paper, with the first two strides of 2 dropped.
MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenetv2(num_classes: int, in_chans: int = 3, width_mult: float = 1.0) -> nn.Module:
    """MobileNetV2; channels are multiples of 8 near ``width_mult`` × the published ones."""

    def scaled(channels: int) -> int:
        return max(8, int(channels * width_mult + 4) // 8 * 8)

    channels = scaled(32)
    layers: list[nn.Module] = [conv_bn(in_chans, channels, 3), nn.ReLU6()]
    for expand, outputs, count, stride in MOBILENET_V2:
        for index in range(count):
            layers.append(InvertedResidual(channels, scaled(outputs), stride if index == 0 else 1, expand))
            channels = scaled(outputs)
    # The paper does not shrink the last layer; small images need no such head.
    last = scaled(1280)
    layers += [conv_bn(channels, last, 1), nn.ReLU6()]
    return Classifier(nn.Sequential(*layers), last, num_classes)


class ShuffleUnit(nn.Module):
    """Half of the channels passes by, half goes through 1×1, depthwise 3×3, 1×1; then the halves are interleaved.

    At stride 2 both halves see all channels and the passing one is a depthwise 3×3 and a 1×1 convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        half = outputs // 2
        self.split = stride == 1
        taken = half if self.split else inputs
        self.branch = nn.Sequential(
            conv_bn(taken, half, 1),
            nn.ReLU(),
            conv_bn(half, half, 3, stride, groups=half),
            conv_bn(half, half, 1),
            nn.ReLU(),
        )
        self.passing: nn.Module = nn.Identity()
        if not self.split:
            self.passing = nn.Sequential(
                conv_bn(inputs, inputs, 3, stride, groups=inputs), conv_bn(inputs, half, 1), nn.ReLU()
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] → [B, outputs, ⌈H / stride⌉, ⌈W / stride⌉]."""
        left, right = x.chunk(2, 1) if self.split else (x, x)
        out = torch.stack((self.passing(left), self.branch(right)), 2)
        return out.flatten(1, 2)


# Channels of the three stages and of the last convolution: table 5 of the paper.
SHUFFLENET_V2 = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}


def shufflenetv2(num_classes: int, in_chans: int = 3, width_mult: float = 1.0) -> nn.Module:
    """ShuffleNetV2 with 4, 8 and 4 units.

    Raises:
        ValueError: ``width_mult`` is none of the published 0.5, 1.0, 1.5, 2.0.
    """
    if width_mult not in SHUFFLENET_V2:
        raise ValueError(f"width_mult = {width_mult} is none of {', '.join(map(str, SHUFFLENET_V2))}")
    *stages, last = SHUFFLENET_V2[width_mult]
    channels = 24
    layers: list[nn.Module] = [conv_bn(in_chans, channels, 3), nn.ReLU()]
    for outputs, count in zip(stages, (4, 8, 4), strict=True):
        for index in range(count):
            layers.append(ShuffleUnit(channels, outputs, 2 if index == 0 else 1))
            channels = outputs
    layers += [conv_bn(channels, last, 1), nn.ReLU()]
    return Classifier(nn.Sequential(*layers), last, num_classes)
