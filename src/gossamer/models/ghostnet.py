"""GhostNet, any width, with a variant for small images."""

from __future__ import annotations

from torch import Tensor, nn

from gossamer.models.blocks import ConvBNAct, GhostBottleneck, round_channels
from gossamer.models.options import check, initialise

BLOCKS: tuple[tuple[int, int, int, bool, int], ...] = (
    (3, 16, 16, False, 1),
    (3, 48, 24, False, 2),
    (3, 72, 24, False, 1),
    (5, 72, 40, True, 2),
    (5, 120, 40, True, 1),
    (3, 240, 80, False, 2),
    (3, 200, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 480, 112, True, 1),
    (3, 672, 112, True, 1),
    (5, 672, 160, True, 2),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
)
"""Kernel, middle and output channels, squeeze-and-excite, stride of each bottleneck: table 1 of the paper."""


class GhostNet(nn.Module):
    """The network that `ghostnet` builds; see there for the arguments."""

    def __init__(self, *, num_classes: int, in_channels: int, width_mult: float, small: bool, dropout: float) -> None:
        super().__init__()
        channels = round_channels(16 * width_mult, 4)
        layers: list[nn.Module] = [ConvBNAct(in_channels, channels, stride=1 if small else 2)]
        for i, (kernel, middle, wanted, squeeze, stride) in enumerate(BLOCKS):
            width, wide = round_channels(wanted * width_mult, 4), round_channels(middle * width_mult, 4)
            strides = 1 if small and i == 1 else stride
            layers.append(GhostBottleneck(channels, width, middle=wide, kernel=kernel, stride=strides, squeeze=squeeze))
            channels = width
        last = round_channels(960 * width_mult, 4)
        layers.append(ConvBNAct(channels, last, kernel=1))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Conv2d(last, 1280, 1)
        self.relu = nn.ReLU(inplace=True)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, num_classes))
        initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits, (N, num_classes)."""
        hidden_NC11 = self.relu(self.hidden(self.pool(self.features(x_NCHW))))
        logits: Tensor = self.classifier(hidden_NC11.flatten(1))
        return logits


def ghostnet(
    *, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small: bool = False, dropout: float = 0.2
) -> nn.Module:
    """GhostNet with random weights.

    Examples:
        >>> sum(p.numel() for p in ghostnet().parameters())
        5182508

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width_mult: scales every width but the 1280 channels before the classifier, above 0; widths are then rounded to multiples of 4.
        small: for images of 32x32: the stem and the first block that would halve the image keep its size, so that 32x32 ends at
            4x4 instead of 1x1. Where that block no longer needs its depthwise convolution, it has none.
        dropout: before the classifier, in [0, 1).

    Returns:
        The network, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020.
    """
    check("ghostnet", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, dropout=dropout)
    return GhostNet(num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, small=small, dropout=dropout)
