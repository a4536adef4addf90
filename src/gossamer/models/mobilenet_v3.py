"""MobileNetV3, large and small, with torchvision's parameter names, any width, and variants for small images."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from gossamer.models.blocks import ConvBNAct, InvertedResidualSE, round_channels
from gossamer.models.options import check, initialise

Block = tuple[int, int, int, bool, bool, int]
LARGE: tuple[Block, ...] = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
"""Kernel, middle and output channels, squeeze-and-excite, hard swish, stride of each block: table 1 of the paper."""

SMALL: tuple[Block, ...] = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)
"""The same of the small network: table 2."""


class MobileNetV3(nn.Module):
    """The network that `mobilenet_v3_large` and `mobilenet_v3_small` build; see there for the arguments."""

    def __init__(
        self,
        blocks: tuple[Block, ...],
        hidden: int,
        *,
        num_classes: int,
        in_channels: int,
        width_mult: float,
        small: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        conv = partial(ConvBNAct, activation=nn.Hardswish, eps=1e-3, momentum=0.01)
        channels = round_channels(16 * width_mult)
        layers: list[nn.Module] = [conv(in_channels, channels, stride=1 if small else 2)]
        first = next(i for i, block in enumerate(blocks) if block[-1] == 2)
        for i, (kernel, middle, wanted, squeeze, swish, stride) in enumerate(blocks):
            width = round_channels(wanted * width_mult)
            layers.append(
                InvertedResidualSE(
                    channels,
                    width,
                    middle=round_channels(middle * width_mult),
                    kernel=kernel,
                    stride=1 if small and i == first else stride,
                    squeeze=squeeze,
                    activation=nn.Hardswish if swish else nn.ReLU,
                )
            )
            channels = width
        layers.append(conv(channels, 6 * channels, kernel=1))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        hidden = round_channels(hidden * width_mult)
        self.classifier = nn.Sequential(
            nn.Linear(6 * channels, hidden), nn.Hardswish(inplace=True), nn.Dropout(dropout), nn.Linear(hidden, num_classes)
        )
        initialise(self, linear_std=0.01)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits, (N, num_classes)."""
        logits: Tensor = self.classifier(self.pool(self.features(x_NCHW)).flatten(1))
        return logits


def mobilenet_v3_large(
    *, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small: bool = False, dropout: float = 0.2
) -> nn.Module:
    """MobileNetV3-Large with random weights; its state dict has torchvision's names and shapes.

    Examples:
        >>> sum(p.numel() for p in mobilenet_v3_large().parameters())
        5483032

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width_mult: scales every width, above 0; widths are then rounded by `round_channels`.
        small: for images of 32x32: the stem and the first block that would halve the image keep its size, so that 32x32 ends at
            4x4 instead of 1x1. The weights have the same shapes either way.
        dropout: before the last layer, in [0, 1).

    Returns:
        The network, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: Howard et al., "Searching for MobileNetV3", ICCV 2019.
    """
    check("mobilenet_v3_large", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, dropout=dropout)
    return MobileNetV3(LARGE, 1280, num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, small=small, dropout=dropout)


def mobilenet_v3_small(
    *, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small: bool = False, dropout: float = 0.2
) -> nn.Module:
    """MobileNetV3-Small with random weights; its state dict has torchvision's names and shapes.

    Examples:
        >>> sum(p.numel() for p in mobilenet_v3_small().parameters())
        2542856

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width_mult: scales every width, above 0; widths are then rounded by `round_channels`.
        small: for images of 32x32, not for the size of the network: the stem and the first block that would halve the image keep its
            size, so that 32x32 ends at 4x4 instead of 1x1. The weights have the same shapes either way.
        dropout: before the last layer, in [0, 1).

    Returns:
        The network, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: Howard et al., "Searching for MobileNetV3", ICCV 2019.
    """
    check("mobilenet_v3_small", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, dropout=dropout)
    return MobileNetV3(SMALL, 1024, num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, small=small, dropout=dropout)
