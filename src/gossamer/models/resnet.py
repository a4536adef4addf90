"""Residual networks: ResNet-18, 34 and 50 with torchvision's parameter names, and ones of 8 and 20 layers for small images."""

from __future__ import annotations

from torch import Tensor, nn

from gossamer.errors import SourceError
from gossamer.models.blocks import BasicBlock, BasicResidual, Bottleneck, ConvBNAct, round_channels
from gossamer.models.options import check, initialise


class ResNet(nn.Module):
    """The network that `resnet18`, `resnet34` and `resnet50` build; see there for the arguments.

    Args:
        block: of every stage.
        depths: blocks of each of the four stages.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        num_classes: int,
        in_channels: int,
        width_mult: float,
        small: bool,
    ) -> None:
        super().__init__()
        channels = round_channels(64 * width_mult)
        self.conv1, self.bn1 = ConvBNAct(in_channels, channels, kernel=3 if small else 7, stride=1 if small else 2, activation=None)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        stages = []
        for i, depth in enumerate(depths):
            width = round_channels(64 * 2**i * width_mult) * block.expansion
            first = block(channels, width, stride=1 if i == 0 else 2)
            stages.append(nn.Sequential(first, *(block(width, width) for _ in range(depth - 1))))
            channels = width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits, (N, num_classes)."""
        x_NCHW = self.maxpool(self.relu(self.bn1(self.conv1(x_NCHW))))
        x_NCHW = self.layer4(self.layer3(self.layer2(self.layer1(x_NCHW))))
        logits: Tensor = self.fc(self.avgpool(x_NCHW).flatten(1))
        return logits


def resnet18(*, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small: bool = False) -> nn.Module:
    """ResNet-18 with random weights; its state dict has torchvision's names and shapes.

    Examples:
        >>> sum(p.numel() for p in resnet18().parameters())
        11689512

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width_mult: scales every width, above 0; widths are then rounded by `round_channels`.
        small: for images of 32x32: a 3x3 stem that keeps the size of the image, so that 32x32 ends at 4x4 instead of 1x1.

    Returns:
        The network, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1.
    """
    check("resnet18", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult)
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, small=small)


def resnet34(*, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small: bool = False) -> nn.Module:
    """ResNet-34 with random weights; its state dict has torchvision's names and shapes. Arguments as of `resnet18`.

    Examples:
        >>> sum(p.numel() for p in resnet34().parameters())
        21797672

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1.
    """
    check("resnet34", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult)
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, small=small)


def resnet50(*, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small: bool = False) -> nn.Module:
    """ResNet-50 with random weights, strides on the 3x3 convolutions; its state dict has torchvision's names and shapes. Arguments as of
    `resnet18`.

    Examples:
        >>> sum(p.numel() for p in resnet50().parameters())
        25557032

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1; strides as published since (see `Bottleneck`).
    """
    check("resnet50", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult)
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, small=small)


class SmallResNet(nn.Module):
    """The network that `resnet8` and `resnet20` build; see there for the arguments.

    Args:
        depth: blocks of each of the three stages.
        width: channels of the first stage.
    """

    def __init__(self, depth: int, width: int, *, num_classes: int, in_channels: int, small: bool) -> None:
        super().__init__()
        if small:
            self.stem: nn.Module = ConvBNAct(in_channels, width)
        else:
            self.stem = nn.Sequential(*ConvBNAct(in_channels, width, kernel=7, stride=2), nn.MaxPool2d(3, 2, 1))
        blocks = []
        for stage in range(3):
            wide = width * 2**stage
            for i in range(depth):
                entering = stage > 0 and i == 0
                blocks.append(BasicResidual(wide // 2 if entering else wide, wide, stride=2 if entering else 1))
        self.stages = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, num_classes)
        initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits, (N, num_classes)."""
        logits: Tensor = self.head(self.pool(self.stages(self.stem(x_NCHW))).flatten(1))
        return logits


def resnet8(*, num_classes: int = 10, in_channels: int = 3, width: int = 16, width_mult: float = 1.0, small: bool = True) -> nn.Module:
    """A residual network of eight weighted layers in a row: stem, three blocks of two (widths w, 2w, 4w; strides 1, 2, 2), linear head.

    Examples:
        >>> import torch
        >>> resnet8(in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width: channels of the first stage, at least 1.
        width_mult: scales ``width``, above 0; rounded to whole channels.
        small: for images of 8x8 to 32x32; False is a 7x7 stem that takes a quarter of each side.

    Returns:
        The network with random weights, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: the design of He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, at one block a stage.
    """
    if num_classes < 1 or in_channels < 1 or width < 1:
        raise SourceError(f"resnet8 takes num_classes, in_channels and width of at least 1, not {num_classes}, {in_channels} and {width}")
    check("resnet8", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult)
    return SmallResNet(1, max(1, round(width * width_mult)), num_classes=num_classes, in_channels=in_channels, small=small)


def resnet20(*, num_classes: int = 10, in_channels: int = 3, width_mult: float = 1.0, small: bool = True) -> nn.Module:
    """A residual network of twenty layers: stem, three stages of three blocks (widths 16, 32, 64), linear head; 1x1 shortcuts where widths grow.

    Examples:
        >>> sum(p.numel() for p in resnet20().parameters())
        272474

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width_mult: scales every width, above 0; rounded to whole channels.
        small: for images of 8x8 to 32x32; False is a 7x7 stem that takes a quarter of each side.

    Returns:
        The network with random weights, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 and table 6.
    """
    check("resnet20", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult)
    return SmallResNet(3, max(1, round(16 * width_mult)), num_classes=num_classes, in_channels=in_channels, small=small)
