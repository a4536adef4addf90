"""Blocks that make half of their channels from the other half. Shape letters: N batch, C channels, H height, W width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gossamer.models.blocks.convolution import ConvBNAct, SqueezeExcite, round_channels


class GhostModule(nn.Module):
    """A 1x1 convolution for some of the channels, and a depthwise 3x3 one of these for the others.

    Examples:
        >>> GhostModule(8, 16)(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 16, 4, 4])

    Args:
        in_channels, out_channels: C of the input and the output.
        ratio: one in so many channels comes from the 1x1 convolution, at least 2.
        activation: makes the activations; None leaves them out.

    Source: Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, ratio: int = 2, activation: Callable[..., nn.Module] | None = nn.ReLU
    ) -> None:
        super().__init__()
        own = -(-out_channels // ratio)
        self.primary = ConvBNAct(in_channels, own, kernel=1, activation=activation)
        self.cheap = nn.Sequential(
            nn.Conv2d(own, own * (ratio - 1), 3, padding=1, groups=own, bias=False), nn.BatchNorm2d(own * (ratio - 1))
        )
        if activation is not None:
            self.cheap.append(activation(inplace=True))
        self.spare = own * ratio - out_channels

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The block's output, (N, out_channels, H, W)."""
        own_NCHW = self.primary(x_NCHW)
        y_NCHW = torch.cat([own_NCHW, self.cheap(own_NCHW)], 1)
        return y_NCHW[:, : -self.spare] if self.spare else y_NCHW


class GhostBottleneck(nn.Module):
    """Widen and narrow by ghost modules, with a depthwise convolution between them at stride 2; add the shortcut.

    Examples:
        >>> GhostBottleneck(8, 16, middle=32, stride=2)(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 16, 2, 2])

    Args:
        in_channels, out_channels: C of the input and the output.
        middle: channels between the ghost modules.
        kernel: of the depthwise convolutions, odd.
        stride: 1 leaves the depthwise convolution out.
        squeeze: whether to scale the middle's channels by squeeze-and-excite.

    Source: Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020, figure 3.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, middle: int, kernel: int = 3, stride: int = 1, squeeze: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [GhostModule(in_channels, middle)]
        if stride > 1:
            layers.append(ConvBNAct(middle, middle, kernel=kernel, stride=stride, groups=middle, activation=None))
        if squeeze:
            layers.append(SqueezeExcite(middle, round_channels(middle / 4, 4)))
        layers.append(GhostModule(middle, out_channels, activation=None))
        self.block = nn.Sequential(*layers)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != out_channels:
            self.shortcut.extend(
                [
                    ConvBNAct(in_channels, in_channels, kernel=kernel, stride=stride, groups=in_channels, activation=None),
                    ConvBNAct(in_channels, out_channels, kernel=1, activation=None),
                ]
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The block's output, (N, out_channels, H / stride, W / stride)."""
        y_NCHW: Tensor = self.block(x_NCHW) + self.shortcut(x_NCHW)
        return y_NCHW
