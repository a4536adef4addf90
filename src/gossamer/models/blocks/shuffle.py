"""Blocks of grouped convolutions between which channels are shuffled. Shape letters: N batch, C channels, H height, W width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.errors import SourceError
from gossamer.models.blocks.convolution import ConvBNAct


class ChannelShuffle(nn.Module):
    """Deal the channels out anew: the first of each group, then the second of each, and so on.

    Examples:
        >>> ChannelShuffle(2)(torch.arange(6.0).reshape(1, 6, 1, 1)).flatten().tolist()
        [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]

    Args:
        groups: a divisor of C.

    Source: Zhang et al., "ShuffleNet", CVPR 2018.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The same channels in another order."""
        return x_NCHW.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class GroupedShuffle(nn.Module):
    """A grouped 1x1 convolution, a shuffle, a depthwise 3x3 and another grouped 1x1 convolution; add the input where the shapes agree.

    Examples:
        >>> GroupedShuffle(24, 24, groups=3)(torch.zeros(1, 24, 4, 4)).shape
        torch.Size([1, 24, 4, 4])

    Args:
        in_channels, out_channels: C of the input and the output, multiples of ``groups``.
        groups: of the 1x1 convolutions.
        middle: channels of the depthwise convolution, a multiple of ``groups``; default: a quarter of the outputs, rounded up to one.
        stride: of the depthwise convolution; the input is added at stride 1 only.

    Raises:
        SourceError: channels that do not divide into the groups.

    Source: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", CVPR 2018, figure 2b.
    """

    def __init__(self, in_channels: int, out_channels: int, *, groups: int = 4, middle: int | None = None, stride: int = 1) -> None:
        super().__init__()
        middle = -(-out_channels // (4 * groups)) * groups if middle is None else middle
        if groups < 1 or any(c < 1 or c % groups for c in (in_channels, out_channels, middle)):
            raise SourceError(f"GroupedShuffle: {in_channels}, {middle} and {out_channels} channels do not divide into {groups} groups")
        self.block = nn.Sequential(
            ConvBNAct(in_channels, middle, kernel=1, groups=groups),
            ChannelShuffle(groups),
            ConvBNAct(middle, middle, stride=stride, groups=middle, activation=None),
            ConvBNAct(middle, out_channels, kernel=1, groups=groups, activation=None),
        )
        self.relu = nn.ReLU(inplace=True)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The block's output, (N, out_channels, H / stride, W / stride)."""
        y_NCHW: Tensor = self.block(x_NCHW)
        out_NCHW: Tensor = self.relu(x_NCHW + y_NCHW if self.residual else y_NCHW)
        return out_NCHW


class ShuffleUnit(nn.Module):
    """Filter half of the channels depthwise, keep or filter the other half, and shuffle both. Names as in torchvision's ShuffleNetV2.

    Examples:
        >>> ShuffleUnit(8, 16, stride=2)(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 16, 2, 2])

    Args:
        in_channels: C of the input; at stride 1 the same as of the output.
        out_channels: C of the output, even.
        stride: 1 splits the input and keeps half of it; 2 filters all of it twice and halves H and W.

    Raises:
        SourceError: channels that do not fit.

    Source: Ma et al., "ShuffleNet V2", ECCV 2018, figure 3 c and d.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        if out_channels % 2 or (stride == 1 and in_channels != out_channels):
            raise SourceError(
                f"ShuffleUnit: {in_channels} to {out_channels} channels at stride {stride}: an even number, equal at stride 1"
            )
        half = out_channels // 2
        kept = in_channels if stride > 1 else half
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1.extend(
                [*ConvBNAct(kept, kept, stride=stride, groups=kept, activation=None), *ConvBNAct(kept, half, kernel=1)],
            )
        self.branch2 = nn.Sequential(
            *ConvBNAct(kept, half, kernel=1),
            *ConvBNAct(half, half, stride=stride, groups=half, activation=None),
            *ConvBNAct(half, half, kernel=1),
        )
        self.shuffle = ChannelShuffle(2)
        self.split = stride == 1

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The block's output, (N, out_channels, H / stride, W / stride)."""
        if self.split:
            kept_NCHW, x_NCHW = x_NCHW.chunk(2, dim=1)
        else:
            kept_NCHW = self.branch1(x_NCHW)
        y_NCHW: Tensor = self.shuffle(torch.cat([kept_NCHW, self.branch2(x_NCHW)], 1))
        return y_NCHW
