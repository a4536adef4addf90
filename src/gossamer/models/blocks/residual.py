"""Blocks that add their input to their output. Shape letters: N batch, C channels, H height, W width."""

from __future__ import annotations

from torch import Tensor, nn

from gossamer.models.blocks.convolution import ConvBNAct


class BasicResidual(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shapes differ.

    Examples:
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


class BasicBlock(nn.Module):
    """`BasicResidual` with the parameter names of torchvision's ResNets.

    Examples:
        >>> import torch
        >>> BasicBlock(8, 16, stride=2)(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 16, 2, 2])

    Args:
        in_channels, out_channels: C of the input and the output.
        stride: of the first convolution.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, figure 5 left.
    """

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = ConvBNAct(in_channels, out_channels, stride=stride, activation=None)
        self.conv2, self.bn2 = ConvBNAct(out_channels, out_channels, activation=None)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The block's output, (N, out_channels, H / stride, W / stride)."""
        y_NCHW = self.relu(self.bn1(self.conv1(x_NCHW)))
        y_NCHW = self.bn2(self.conv2(y_NCHW))
        out_NCHW: Tensor = self.relu(y_NCHW + (x_NCHW if self.downsample is None else self.downsample(x_NCHW)))
        return out_NCHW


class Bottleneck(nn.Module):
    """Narrow by a 1x1 convolution, filter by a 3x3 one, widen by a 1x1 one; add the shortcut. Names as in torchvision's ResNets.

    Examples:
        >>> import torch
        >>> Bottleneck(16, 32, stride=2)(torch.zeros(1, 16, 4, 4)).shape
        torch.Size([1, 32, 2, 2])

    Args:
        in_channels, out_channels: C of the input and the output; a quarter of the output is the width of the middle.
        stride: of the 3x3 convolution.
        groups: of the 3x3 convolution, a divisor of ``out_channels / 4``.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, figure 5 right. The stride sits on the 3x3 convolution, as in
    the networks that are published today, not on the first 1x1.
    """

    expansion = 4

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        middle = out_channels // self.expansion
        self.conv1, self.bn1 = ConvBNAct(in_channels, middle, kernel=1, activation=None)
        self.conv2, self.bn2 = ConvBNAct(middle, middle, stride=stride, groups=groups, activation=None)
        self.conv3, self.bn3 = ConvBNAct(middle, out_channels, kernel=1, activation=None)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The block's output, (N, out_channels, H / stride, W / stride)."""
        y_NCHW = self.relu(self.bn1(self.conv1(x_NCHW)))
        y_NCHW = self.relu(self.bn2(self.conv2(y_NCHW)))
        y_NCHW = self.bn3(self.conv3(y_NCHW))
        out_NCHW: Tensor = self.relu(y_NCHW + (x_NCHW if self.downsample is None else self.downsample(x_NCHW)))
        return out_NCHW


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """A 1x1 convolution where the shapes differ."""
    if stride == 1 and in_channels == out_channels:
        return None
    return ConvBNAct(in_channels, out_channels, kernel=1, stride=stride, activation=None)
