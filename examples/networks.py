r"""A user's own teachers: architectures that no library has, for weights that others published.

A configuration names such a network as ``user:examples/networks.py:FACTORY`` and its file of weights; ``key_map`` turns
the names in the file into the names here. Any importable function that takes ``num_classes`` and returns a
``torch.nn.Module`` will do; its ``kwargs`` come from the configuration. The three families below are written from
their published layer tables. The module names follow the weight files, so that the key maps stay short.

CIFAR-10 ResNet-20 … 56 (github.com/akamaster/pytorch_resnet_cifar10)::

    teachers:
      resnet20:
        arch: user:examples/networks.py:cifar_resnet
        kwargs: {depth: 20}
        weights: resnet20-12fca82f.th
        key_map: {state_key: state_dict, strip_prefix: "module."}
        mean: [0.485, 0.456, 0.406]
        std: [0.229, 0.224, 0.225]

MCUNet-in3, 1000 ImageNet classes at 176 px (github.com/mit-han-lab/mcunet)::

    teachers:
      mcunet:
        arch: user:examples/networks.py:mcunet_in3
        weights: mcunet-320kb-1mb_imagenet.pth
        key_map:
          state_key: state_dict
          rename: [["mobile_inverted_conv\\.", ""], ["classifier\\.linear", "classifier"]]
        num_outputs: 1000
        class_index: {n01440764: 0, n02102040: 217}      # and so on: the data's classes
        mean: [0.5, 0.5, 0.5]
        std: [0.5, 0.5, 0.5]
        input_size: 176
        resize: 201                                      # shorter side, then the centre of 176

MobileNetV1 × 0.25, 1000 ImageNet classes at 224 px::

    teachers:
      mobilenet:
        arch: user:examples/networks.py:mobilenet_v1
        kwargs: {width_mult: 0.25}
        weights: mobilenetV1X0.25_model_best.pth.tar
        key_map: {state_key: state_dict, strip_prefix: "module."}
        num_outputs: 1000
        class_index: {n01440764: 0, n02102040: 217}
        mean: [0.485, 0.456, 0.406]
        std: [0.229, 0.224, 0.225]
        input_size: 224
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn


class OptionABlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without weights: every other pixel, missing channels filled with 0."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.fill = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] → [B, outputs, ⌈H / stride⌉, ⌈W / stride⌉]."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.fill, self.fill))
        return F.relu(out + shortcut)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for CIFAR (He et al., CVPR 2016, section 4.2): n blocks of 16, 32 and 64 channels."""

    def __init__(self, depth: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage, outputs in enumerate((16, 32, 64), 1):
            blocks = []
            for index in range((depth - 2) // 6):
                blocks.append(OptionABlock(channels, outputs, 2 if stage > 1 and index == 0 else 1))
                channels = outputs
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return self.linear(x.mean((2, 3)))


def cifar_resnet(num_classes: int, depth: int = 20) -> nn.Module:
    """CIFAR ResNet-20, 32, 44 or 56."""
    if (depth - 2) % 6:
        raise ValueError(f"depth = {depth} is not 6n + 2 (20, 32, 44, 56)")
    return CifarResNet(depth, num_classes)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution, BatchNorm and perhaps ReLU6."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        bn=nn.BatchNorm2d(outputs),
    )
    if act:
        layers["act"] = nn.ReLU6()
    return nn.Sequential(layers)


class MobileBlock(nn.Module):
    """1×1 expansion to ``hidden`` channels, depthwise convolution, linear 1×1; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, hidden: int):
        super().__init__()
        self.inverted_bottleneck = _conv(inputs, hidden, 1) if hidden != inputs else nn.Identity()
        self.depth_conv = _conv(hidden, hidden, kernel, stride, groups=hidden)
        self.point_linear = _conv(hidden, outputs, 1, act=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] → [B, outputs, ⌈H / stride⌉, ⌈W / stride⌉]."""
        out = self.point_linear(self.depth_conv(self.inverted_bottleneck(x)))
        return x + out if self.residual else out


# (outputs, kernel, stride, hidden channels) of every block: the json file beside the weights.
MCUNET_IN3 = (
    (8, 3, 1, 16),
    (16, 7, 2, 24), (16, 3, 1, 80), (16, 7, 1, 80), (16, 5, 1, 64),
    (24, 5, 2, 80), (24, 5, 1, 120), (24, 5, 1, 120),
    (40, 3, 2, 120), (40, 7, 1, 240), (40, 5, 1, 160), (48, 5, 1, 200), (48, 7, 1, 240), (48, 3, 1, 240),
    (96, 3, 2, 288), (96, 7, 1, 480), (96, 3, 1, 384), (160, 7, 1, 480),
)  # fmt: skip


class MCUNet(nn.Module):
    """MCUNet-in3 (Lin et al., NeurIPS 2020): a searched network of mobile blocks for 176 px."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.first_conv = _conv(3, 16, 3, 2)
        blocks, channels = [], 16
        for outputs, kernel, stride, hidden in MCUNET_IN3:
            blocks.append(MobileBlock(channels, outputs, kernel, stride, hidden))
            channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, num_classes]."""
        return self.classifier(self.blocks(self.first_conv(x)).mean((2, 3)))


def mcunet_in3(num_classes: int) -> nn.Module:
    """MCUNet-in3."""
    return MCUNet(num_classes)


class MobileNetV1(nn.Module):
    """MobileNet (Howard et al., 2017): 13 pairs of depthwise 3×3 and 1×1 convolutions, here with LeakyReLU(0.1)."""

    def __init__(self, num_classes: int, width_mult: float):
        super().__init__()

        def scaled(channels: int) -> int:
            return int(channels * width_mult)

        def pair(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            inputs, outputs = scaled(inputs), scaled(outputs)
            return nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs),
                nn.LeakyReLU(0.1),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(0.1),
            )

        stem = nn.Sequential(
            nn.Conv2d(3, scaled(32), 3, 2, 1, bias=False), nn.BatchNorm2d(scaled(32)), nn.LeakyReLU(0.1)
        )
        self.stage1 = nn.Sequential(
            stem, pair(32, 64, 1), pair(64, 128, 2), pair(128, 128, 1), pair(128, 256, 2), pair(256, 256, 1)
        )
        self.stage2 = nn.Sequential(pair(256, 512, 2), *(pair(512, 512, 1) for _ in range(5)))
        self.stage3 = nn.Sequential(pair(512, 1024, 2), pair(1024, 1024, 1))
        self.fc = nn.Linear(scaled(1024), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, num_classes]."""
        return self.fc(self.stage3(self.stage2(self.stage1(x))).mean((2, 3)))


def mobilenet_v1(num_classes: int, width_mult: float = 1.0) -> nn.Module:
    """MobileNetV1."""
    return MobileNetV1(num_classes, width_mult)
