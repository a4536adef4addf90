"""Blocks of plain convolutions. Shape letters: N batch, C channels, H height, W width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def round_channels(channels: float, multiple: int = 8) -> int:
    """The multiple of ``multiple`` nearest to ``channels``, but never more than 10% below it and never 0.

    Examples:
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

    Examples:
        >>> import torch
        >>> ConvBNAct(3, 8, stride=2)(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 8, 4, 4])

    Args:
        in_channels, out_channels: C of the input and the output.
        kernel: side of the square kernel, odd; the padding keeps H and W at stride 1.
        stride: 1 keeps H and W, 2 halves them.
        groups: of the convolution; ``groups=in_channels`` is depthwise.
        activation: makes the activation, ``nn.ReLU`` or ``nn.ReLU6`` for example; None leaves it out.
        eps, momentum: of the normalisation.
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
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum),
        ]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)


class DepthwiseSeparable(nn.Sequential):
    """A depthwise 3x3 convolution, then a 1x1 one that mixes channels; each with normalisation and activation.

    Examples:
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


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in [0, 1] that two 1x1 convolutions compute from the means of all channels.

    Examples:
        >>> import torch
        >>> SqueezeExcite(16, 8)(torch.zeros(1, 16, 4, 4)).shape
        torch.Size([1, 16, 4, 4])

    Args:
        channels: C of the input and the output.
        squeezed: channels between the two convolutions.

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018; the hard sigmoid as in Howard et al., "Searching for MobileNetV3",
    ICCV 2019.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The scaled input, of the same shape."""
        gates_NC11: Tensor = self.gate(self.fc2(self.relu(self.fc1(self.pool(x_NCHW)))))
        return gates_NC11 * x_NCHW


class Fire(nn.Module):
    """Narrow by a 1x1 convolution, then widen by 1x1 and 3x3 ones side by side; no normalisation.

    Examples:
        >>> import torch
        >>> Fire(16, 4, 8)(torch.zeros(1, 16, 4, 4)).shape
        torch.Size([1, 16, 4, 4])

    Args:
        in_channels: C of the input.
        squeezed: channels of the narrow part.
        expanded: outputs of each of the two convolutions: C of the output is twice that.

    Source: Iandola et al., "SqueezeNet", arXiv:1602.07360.
    """

    def __init__(self, in_channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The block's output, (N, 2 * expanded, H, W)."""
        s_NCHW: Tensor = self.relu(self.squeeze(x_NCHW))
        return torch.cat([self.relu(self.expand1x1(s_NCHW)), self.relu(self.expand3x3(s_NCHW))], 1)
