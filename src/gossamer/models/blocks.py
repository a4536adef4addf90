"""Building blocks of convolutional networks. Shape letters: N batch, C channels, H height, W width."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def round_channels(channels: float, multiple: int = 8) -> int:
    """The multiple of ``multiple`` nearest to ``channels``, but never more than 10% below it and never 0.

    Example:
        >>> [round_channels(c) for c in (3, 24 * 0.75, 32 * 0.35, 1280 * 0.5)]
        [8, 24, 16, 640]

    Args:
        channels: a wanted number of channels, above 0.
        multiple: at least 1.

    Returns:
        The number of channels to use.

    Source: the channel rule of the MobileNet family (Sandler et al., "MobileNetV2", CVPR 2018, and its published code).
    """
    rounded = max(multiple, int(channels + multiple / 2) // multiple * multiple)
    return rounded + multiple if rounded < 0.9 * channels else rounded


class ConvBNAct(nn.Sequential):
    """Convolution without bias, batch normalisation, and an activation where one is given.

    Example:
        >>> import torch
        >>> ConvBNAct(3, 8, stride=2)(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 8, 4, 4])

    Args:
        in_channels, out_channels: C of the input and the output.
        kernel: side of the square kernel, odd; the padding keeps H and W at stride 1.
        stride: 1 keeps H and W, 2 halves them.
        groups: of the convolution; ``groups=in_channels`` is depthwise.
        activation: makes the activation, ``nn.ReLU`` or ``nn.ReLU6`` for example; None leaves it out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        activation: Callable[..., nn.Module] | None = nn.ReLU,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)


class DepthwiseSeparable(nn.Sequential):
    """A depthwise 3x3 convolution, then a 1x1 one that mixes channels; each with normalisation and activation.

    Example:
        >>> import torch
        >>> DepthwiseSeparable(8, 16, stride=2)(torch.zeros(1, 8, 8, 8)).shape
        torch.Size([1, 16, 4, 4])

    Args:
        in_channels, out_channels: C of the input and the output.
        stride: of the depthwise convolution.
        activation: makes the activations.

    Source: Howard et al., "MobileNets", arXiv:1704.04861.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, activation: Callable[..., nn.Module] | None = nn.ReLU
    ) -> None:
        super().__init__(
            ConvBNAct(in_channels, in_channels, stride=stride, groups=in_channels, activation=activation),
            ConvBNAct(in_channels, out_channels, kernel=1, activation=activation),
        )


class InvertedResidual(nn.Module):
    """Widen by a 1x1 convolution, filter depthwise, narrow by a linear 1x1 convolution; add the input where the shapes agree.

    Example:
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


class BasicResidual(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shapes differ.

    Example:
        >>> import torch
        >>> BasicResidual(8, 16, stride=2)(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 16, 2, 2])

    Args:
        in_channels, out_channels: C of the input and the output.
        stride: of the first convolution.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        same = stride == 1 and in_channels == out_channels
        self.conv1 = ConvBNAct(in_channels, out_channels, stride=stride)
        self.conv2 = ConvBNAct(out_channels, out_channels, activation=None)
        self.shortcut = nn.Identity() if same else ConvBNAct(in_channels, out_channels, kernel=1, stride=stride, activation=None)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The block's output, (N, out_channels, H / stride, W / stride)."""
        y_NCHW: Tensor = self.relu(self.conv2(self.conv1(x_NCHW)) + self.shortcut(x_NCHW))
        return y_NCHW
