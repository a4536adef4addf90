"""MobileNetV1 and V2, any width, with variants for small images; V2 with torchvision's parameter names."""

from __future__ import annotations

from torch import Tensor, nn

from gossamer.models.blocks import ConvBNAct, DepthwiseSeparable, InvertedResidual, round_channels
from gossamer.models.options import check, initialise

V1_BLOCKS: tuple[tuple[int, int], ...] = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""Channels and stride of each depthwise separable block: table 1 of the first paper."""

STAGES: tuple[tuple[int, int, int, int], ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks and stride of each stage: table 2 of the second paper."""


class MobileNetV1(nn.Module):
    """The network that `mobilenet_v1` builds; see there for the arguments."""

    def __init__(self, *, num_classes: int, in_channels: int, width_mult: float, small: bool, dropout: float) -> None:
        super().__init__()
        channels = round_channels(32 * width_mult)
        layers: list[nn.Module] = [ConvBNAct(in_channels, channels, stride=1 if small else 2)]
        for i, (wanted, stride) in enumerate(V1_BLOCKS):
            width = round_channels(wanted * width_mult)
            layers.append(DepthwiseSeparable(channels, width, stride=1 if small and i == 1 else stride))
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        initialise(self, linear_std=0.01)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits, (N, num_classes)."""
        logits: Tensor = self.classifier(self.pool(self.features(x_NCHW)).flatten(1))
        return logits


class MobileNetV2(nn.Module):
    """The network that `mobilenet_v2` builds; see there for the arguments."""

    def __init__(self, *, num_classes: int, in_channels: int, width_mult: float, small: bool, dropout: float) -> None:
        super().__init__()
        channels = round_channels(32 * width_mult)
        last = round_channels(1280 * max(1.0, width_mult))
        layers: list[nn.Module] = [ConvBNAct(in_channels, channels, stride=1 if small else 2, activation=nn.ReLU6)]
        for stage, (expand, wanted, blocks, stride) in enumerate(STAGES):
            width = round_channels(wanted * width_mult)
            for i in range(blocks):
                s = stride if i == 0 and not (small and stage == 1) else 1
                layers.append(InvertedResidual(channels, width, stride=s, expand=expand))
                channels = width
        layers.append(ConvBNAct(channels, last, kernel=1, activation=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits, (N, num_classes)."""
        logits: Tensor = self.classifier(self.pool(self.features(x_NCHW)).flatten(1))
        return logits


def mobilenet_v1(
    *, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small: bool = False, dropout: float = 0.001
) -> nn.Module:
    """MobileNetV1 with random weights: a convolution, then 13 depthwise separable blocks.

    Examples:
        >>> sum(p.numel() for p in mobilenet_v1().parameters())
        4231976

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width_mult: scales every width, above 0; widths are then rounded by `round_channels`.
        small: for images of 32x32: the stem and the first block that would halve the image keep its size, so that 32x32 ends at
            4x4 instead of 1x1. The weights have the same shapes either way.
        dropout: before the classifier, in [0, 1).

    Returns:
        The network, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", arXiv:1704.04861.
    """
    check("mobilenet_v1", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, dropout=dropout)
    return MobileNetV1(num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, small=small, dropout=dropout)


def mobilenet_v2(
    *, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small: bool = False, dropout: float = 0.2
) -> nn.Module:
    """MobileNetV2 with random weights; its state dict has torchvision's names and shapes.

    Examples:
        >>> sum(p.numel() for p in mobilenet_v2().parameters())
        3504872

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width_mult: scales every width, above 0; widths are then rounded by `round_channels` (the last one is never below 1280).
        small: for images of 32x32: the stem and the first stage that would halve the image keep its size, so that 32x32 ends at
            4x4 instead of 1x1. The weights have the same shapes either way.
        dropout: before the classifier, in [0, 1).

    Returns:
        The network, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
    """
    check("mobilenet_v2", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, dropout=dropout)
    return MobileNetV2(num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, small=small, dropout=dropout)
