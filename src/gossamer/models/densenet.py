"""DenseNet-BC with torchvision's parameter names: 121 layers for ImageNet, 100 for small images, any width."""

from __future__ import annotations

from torch import Tensor, nn

from gossamer.models.blocks import DenseBlock, Transition
from gossamer.models.options import check, initialise


class DenseNet(nn.Module):
    """The network that `densenet121` and `densenet_bc100` build; see there for the arguments.

    Args:
        layers: of each dense block.
        growth: channels that each layer adds; the stem has twice as many.
    """

    def __init__(self, layers: tuple[int, ...], growth: int, *, num_classes: int, in_channels: int, small: bool) -> None:
        super().__init__()
        channels = 2 * growth
        self.features = nn.Sequential()
        add = self.features.add_module
        if small:
            add("conv0", nn.Conv2d(in_channels, channels, 3, padding=1, bias=False))
        else:
            add("conv0", nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False))
            add("norm0", nn.BatchNorm2d(channels))
            add("relu0", nn.ReLU(inplace=True))
            add("pool0", nn.MaxPool2d(3, 2, 1))
        for i, count in enumerate(layers, start=1):
            add(f"denseblock{i}", DenseBlock(channels, growth, layers=count))
            channels += count * growth
            if i < len(layers):
                add(f"transition{i}", Transition(channels, channels // 2))
                channels //= 2
        add(f"norm{len(layers) + 1}", nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self, mode="fan_in")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits, (N, num_classes)."""
        logits: Tensor = self.classifier(self.pool(self.relu(self.features(x_NCHW))).flatten(1))
        return logits


def densenet121(*, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small: bool = False) -> nn.Module:
    """DenseNet-BC of 121 layers with random weights; its state dict has torchvision's names and shapes.

    Examples:
        >>> sum(p.numel() for p in densenet121().parameters())
        7978856

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width_mult: scales the growth rate, 32, and with it every width; above 0.
        small: for images of 32x32: a 3x3 stem that keeps the size of the image, so that 32x32 ends at 4x4 instead of 1x1.

    Returns:
        The network, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, table 1.
    """
    check("densenet121", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult)
    growth = max(1, round(32 * width_mult))
    return DenseNet((6, 12, 24, 16), growth, num_classes=num_classes, in_channels=in_channels, small=small)


def densenet_bc100(*, num_classes: int = 10, in_channels: int = 3, width_mult: float = 1.0, small: bool = True) -> nn.Module:
    """DenseNet-BC of 100 layers and growth rate 12, for images of 32x32, with random weights.

    Examples:
        >>> sum(p.numel() for p in densenet_bc100().parameters())
        769162

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width_mult: scales the growth rate, 12, and with it every width; above 0.
        small: a 3x3 stem that keeps the size of the image, so that 32x32 ends at 8x8; False is a 7x7 one that takes a quarter of each side.

    Returns:
        The network, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, table 2.
    """
    check("densenet_bc100", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult)
    growth = max(1, round(12 * width_mult))
    return DenseNet((16, 16, 16), growth, num_classes=num_classes, in_channels=in_channels, small=small)
