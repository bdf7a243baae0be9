"""What the built-in networks share."""

from __future__ import annotations

import math

from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, "same" padding at stride 1, then BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Projection(nn.Module):
    """1×1 convolution of every ``stride``-th pixel.

    The pixels are picked first: oneDNN's strided 1×1 kernel (CPU, torch 2.15) writes past its buffers for fewer
    than 8 channels laid out channels last.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] → [B, outputs, ⌈H / stride⌉, ⌈W / stride⌉]."""
        return self.conv(x[:, :, :: self.stride, :: self.stride])


class Classifier(nn.Module):
    """Features, global average pooling and a linear head: works for every image size.

    Args:
        features: [B, channels in, S, S] → [B, ``width``, s, s].
        width: channels of the last feature map.
        num_classes: outputs.
    """

    def __init__(self, features: nn.Module, width: int, num_classes: int):
        super().__init__()
        self.features = features
        self.head = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, S, S] → logits [B, num_classes]."""
        return self.head(self.features(x).mean((2, 3)))


def initialise(module: nn.Module) -> None:
    """Convolutions: normal with variance 2 / fan-out (He et al., ICCV 2015); linear: ± 1 / √fan-in; BN: 1, 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
