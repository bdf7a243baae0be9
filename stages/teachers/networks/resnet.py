"""Residual networks for small images: ResNet (He et al., CVPR 2016) and WideResNet (Zagoruyko & Komodakis, BMVC 2016).

Both begin with one 3×3 convolution at full resolution and have no max-pool, as usual for 28–64 px.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stages.teachers.networks.parts import Classifier, Projection, conv_bn


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus a shortcut, then ReLU; a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut: nn.Module = nn.Identity()
        if changes:
            self.shortcut = nn.Sequential(Projection(inputs, outputs, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] → [B, outputs, ⌈H / stride⌉, ⌈W / stride⌉]."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def _resnet(blocks: tuple[int, ...], num_classes: int, in_chans: int, width: int) -> nn.Module:
    layers: list[nn.Module] = [conv_bn(in_chans, width, 3), nn.ReLU()]
    channels = width
    for stage, count in enumerate(blocks):
        for index in range(count):
            outputs = width * 2**stage
            layers.append(BasicBlock(channels, outputs, 2 if stage > 0 and index == 0 else 1))
            channels = outputs
    return Classifier(nn.Sequential(*layers), channels, num_classes)


def resnet10(num_classes: int, in_chans: int = 3, width: int = 64) -> nn.Module:
    """ResNet-10: one block in each of four stages of ``width`` × 1, 2, 4, 8 channels."""
    return _resnet((1, 1, 1, 1), num_classes, in_chans, width)


def resnet18(num_classes: int, in_chans: int = 3, width: int = 64) -> nn.Module:
    """ResNet-18: two blocks a stage."""
    return _resnet((2, 2, 2, 2), num_classes, in_chans, width)


def resnet34(num_classes: int, in_chans: int = 3, width: int = 64) -> nn.Module:
    """ResNet-34: 3, 4, 6 and 3 blocks."""
    return _resnet((3, 4, 6, 3), num_classes, in_chans, width)


class PreActBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv plus a shortcut; where the shape changes the shortcut projects relu(bn(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = Projection(inputs, outputs, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] → [B, outputs, ⌈H / stride⌉, ⌈W / stride⌉]."""
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


def wrn16_2(num_classes: int, in_chans: int = 3, depth: int = 16, widen: float = 2) -> nn.Module:
    """WRN-``depth``-``widen``: three stages of (depth − 4) / 6 pre-activation blocks, widen × 16, 32, 64 channels.

    Raises:
        ValueError: depth is not 6n + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth = {depth} is not 6n + 4 (10, 16, 22, 28, …)")
    layers: list[nn.Module] = [nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)]
    channels = 16
    for stage in range(3):
        for index in range((depth - 4) // 6):
            outputs = round(16 * widen) * 2**stage
            layers.append(PreActBlock(channels, outputs, 2 if stage > 0 and index == 0 else 1))
            channels = outputs
    layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    return Classifier(nn.Sequential(*layers), channels, num_classes)
