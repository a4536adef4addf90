"""Blocks whose layers see all layers before them. Shape letters: N batch, C channels, H height, W width."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Normalise, narrow by a 1x1 convolution, filter by a 3x3 one: the new channels of one layer. Names as in torchvision's DenseNets.

    Examples:
        >>> DenseLayer(16, 8)(torch.zeros(1, 16, 4, 4)).shape
        torch.Size([1, 8, 4, 4])

    Args:
        in_channels: C of the input.
        growth: C of the output.
        bottleneck: the middle is so many times as wide as the output.

    Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017 (DenseNet-B).
    """

    def __init__(self, in_channels: int, growth: int, *, bottleneck: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, bottleneck * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bottleneck * growth, growth, 3, padding=1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The layer's new channels, (N, growth, H, W)."""
        y_NCHW: Tensor = self.conv1(self.relu1(self.norm1(x_NCHW)))
        y_NCHW = self.conv2(self.relu2(self.norm2(y_NCHW)))
        return y_NCHW


class DenseBlock(nn.ModuleDict):
    """Layers in a row, each of which takes the block's input and the outputs of all layers before it.

    Examples:
        >>> DenseBlock(16, 8, layers=3)(torch.zeros(1, 16, 4, 4)).shape
        torch.Size([1, 40, 4, 4])

    Args:
        in_channels: C of the input.
        growth: channels that each layer adds.
        layers: at least 1.

    Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017.
    """

    def __init__(self, in_channels: int, growth: int, *, layers: int) -> None:
        super().__init__({f"denselayer{i + 1}": DenseLayer(in_channels + i * growth, growth) for i in range(layers)})

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The input and all new channels, (N, in_channels + layers * growth, H, W)."""
        seen = [x_NCHW]
        for layer in self.values():
            seen.append(layer(torch.cat(seen, 1)))
        return torch.cat(seen, 1)


class Transition(nn.Sequential):
    """Between dense blocks: normalise, mix channels by a 1x1 convolution, halve H and W by averaging.

    Examples:
        >>> Transition(16, 8)(torch.zeros(1, 16, 4, 4)).shape
        torch.Size([1, 8, 2, 2])

    Args:
        in_channels, out_channels: C of the input and the output.

    Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017 (DenseNet-C).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(in_channels),
                relu=nn.ReLU(inplace=True),
                conv=nn.Conv2d(in_channels, out_channels, 1, bias=False),
                pool=nn.AvgPool2d(2, 2),
            )
        )
