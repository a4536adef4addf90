"""Blocks that are wide inside and narrow outside. Shape letters: N batch, C channels, H height, W width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from gossamer.models.blocks.convolution import ConvBNAct, SqueezeExcite, round_channels


class InvertedResidual(nn.Module):
    """Widen by a 1x1 convolution, filter depthwise, narrow by a linear 1x1 convolution; add the input where the shapes agree.

    Examples:
        >>> import torch
        >>> InvertedResidual(8, 8, expand=6)(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])

    Args:
        in_channels, out_channels: C of the input and the output.
        stride: of the depthwise convolution; the input is added at stride 1 only.
        expand: how many times wider the middle is; 1 leaves the widening out.

    Source: Sandler et al., "MobileNetV2", CVPR 2018.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, expand: int = 6) -> None:
        super().__init__()
        middle = in_channels * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(ConvBNAct(in_channels, middle, kernel=1, activation=nn.ReLU6))
        layers += [
            ConvBNAct(middle, middle, stride=stride, groups=middle, activation=nn.ReLU6),
            *ConvBNAct(middle, out_channels, kernel=1, activation=None),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The block's output, (N, out_channels, H / stride, W / stride)."""
        y_NCHW: Tensor = self.conv(x_NCHW)
        return x_NCHW + y_NCHW if self.residual else y_NCHW


class InvertedResidualSE(nn.Module):
    """An inverted residual with a kernel and a width of its own, and squeeze-and-excite after the depthwise convolution where asked for.

    Examples:
        >>> import torch
        >>> InvertedResidualSE(8, 8, middle=24, kernel=5)(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])

    Args:
        in_channels, out_channels: C of the input and the output.
        middle: channels of the depthwise convolution; the same as ``in_channels`` leaves the widening out.
        kernel: of the depthwise convolution, odd.
        stride: of the depthwise convolution; the input is added at stride 1 only.
        squeeze: whether to scale channels; a quarter of ``middle`` computes the gates.
        activation: makes the activations.

    Source: Howard et al., "Searching for MobileNetV3", ICCV 2019, section 5.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        middle: int,
        kernel: int = 3,
        stride: int = 1,
        squeeze: bool = True,
        activation: Callable[..., nn.Module] = nn.Hardswish,
    ) -> None:
        super().__init__()
        conv = partial(ConvBNAct, eps=1e-3, momentum=0.01)
        layers: list[nn.Module] = []
        if middle != in_channels:
            layers.append(conv(in_channels, middle, kernel=1, activation=activation))
        layers.append(conv(middle, middle, kernel=kernel, stride=stride, groups=middle, activation=activation))
        if squeeze:
            layers.append(SqueezeExcite(middle, round_channels(middle // 4)))
        layers.append(conv(middle, out_channels, kernel=1, activation=None))
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The block's output, (N, out_channels, H / stride, W / stride)."""
        y_NCHW: Tensor = self.block(x_NCHW)
        return x_NCHW + y_NCHW if self.residual else y_NCHW
