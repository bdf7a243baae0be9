"""Cheaper forms of layers whose weights stay as they are: the same functions, for networks that will be compiled."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fold_batch_norm(network: nn.Module) -> None:
    """Let BatchNorm layers be x · scale + shift with two numbers a channel, in place.

    Compiled code would take the square root of every channel's variance again for every pixel. Inputs, whose statistics
    are matched, are what they were. Subclasses other than timm's compute in ways of their own and are left alone.

    Args:
        network: in evaluation mode; its weights are not changed afterwards.
    """
    for layer in network.modules():
        kind = type(layer)
        if not isinstance(layer, nn.BatchNorm2d) or layer.running_mean is None or layer.running_var is None:
            continue
        if kind is nn.BatchNorm2d or (kind.__name__, kind.__module__) == ("BatchNormAct2d", "timm.layers.norm_act"):
            variance = layer.running_var.double() + layer.eps
            scale = variance.rsqrt() if layer.weight is None else layer.weight.double() * variance.rsqrt()
            shift = -layer.running_mean.double() * scale
            if layer.bias is not None:
                shift = shift + layer.bias.double()
            for name, value in (("scale", scale), ("shift", shift)):
                layer.register_buffer(name, value.detach().to(layer.running_var.dtype).view(-1, 1, 1))
            layer.__class__ = _Folded if kind is nn.BatchNorm2d else _FoldedAct


class _Folded(nn.BatchNorm2d):
    scale: Tensor
    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in the precision of ``x``, computed in that of the weights."""
        return torch.addcmul(self.shift, x.to(self.scale.dtype), self.scale).to(x.dtype)


class _FoldedAct(_Folded):
    """timm's layer of BatchNorm, dropout (none in evaluation mode) and activation."""

    def forward(self, x: Tensor) -> Tensor:
        """See ``_Folded``."""
        act = cast(nn.Module, self.act)
        found: Tensor = act(super().forward(x))
        return found


def widen_depthwise_gradients(network: nn.Module) -> None:
    """Let gradients through strided depthwise convolutions be computed in float32 where they are bfloat16, in place.

    On CPUs oneDNN's bfloat16 takes four to fifty times as long as its float32 (32 images of 112 px with 96 channels:
    186 ms against 50). Nothing else changes. Subclasses of ``Conv2d`` pad in ways of their own and are left alone.
    """
    for layer in network.modules():
        if type(layer) is not nn.Conv2d or not isinstance(layer.padding, tuple) or layer.padding_mode != "zeros":
            continue
        depthwise = layer.groups == layer.in_channels == layer.out_channels > 1
        if depthwise and max(layer.stride) > 1 and max(layer.dilation) == 1:
            layer.__class__ = _StridedDepthwise


class _StridedDepthwise(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H', W']."""
        out: Tensor = _WideGradient.apply(x, self.weight, self.bias, self.stride, self.padding)
        return out


class _WideGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype, ctx.stride, ctx.padding = x.shape, x.dtype, stride, padding
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        wide_type = torch.promote_types(grad.dtype, torch.float32)
        # Of the input its shape and layout are wanted, not its values.
        like = grad.new_empty(batch, height, width, channels, dtype=wide_type).permute(0, 3, 1, 2)
        wide, _, _ = torch.ops.aten.convolution_backward(
            grad.to(wide_type), like, weight.to(wide_type), None, ctx.stride, ctx.padding, [1, 1], False, [0, 0],
            len(weight), [True, False, False],
        )  # fmt: skip
        return wide.to(ctx.dtype), None, None, None, None
