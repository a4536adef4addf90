"""SqueezeNet 1.0 and 1.1, with torchvision's parameter names, any width, and variants for small images."""

from __future__ import annotations

from torch import Tensor, nn

from gossamer.models.blocks import Fire, round_channels
from gossamer.models.options import check, initialise

FIRES: tuple[tuple[int, int], ...] = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
"""Squeezed and expanded channels of the eight fire modules: table 1 of the paper."""


class SqueezeNet(nn.Module):
    """The network that `squeezenet1_0` and `squeezenet1_1` build; see there for the arguments.

    Args:
        stem: channels and kernel of the first convolution.
        pools: numbers of the fire modules before which the image is halved, besides after the stem.
    """

    def __init__(
        self,
        stem: tuple[int, int],
        pools: tuple[int, ...],
        *,
        num_classes: int,
        in_channels: int,
        width_mult: float,
        small: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, kernel = round_channels(stem[0] * width_mult), stem[1]
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, channels, kernel, stride=1 if small else 2, padding=kernel // 2 if small else 0),
            nn.ReLU(inplace=True),
            nn.Identity() if small else _halve(),
        ]
        for i, (squeezed, expanded) in enumerate(FIRES):
            if i in pools:
                layers.append(_halve())
            wide = round_channels(expanded * width_mult)
            layers.append(Fire(channels, round_channels(squeezed * width_mult), wide))
            channels = 2 * wide
        self.features = nn.Sequential(*layers)
        last = nn.Conv2d(channels, num_classes, 1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), last, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
        initialise(self, mode="fan_in")
        nn.init.normal_(last.weight, std=0.01)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits, (N, num_classes); none is negative."""
        logits: Tensor = self.classifier(self.features(x_NCHW)).flatten(1)
        return logits


def _halve() -> nn.Module:
    return nn.MaxPool2d(3, 2, ceil_mode=True)


def squeezenet1_0(
    *, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small: bool = False, dropout: float = 0.5
) -> nn.Module:
    """SqueezeNet 1.0 with random weights; its state dict has torchvision's names and shapes.

    Examples:
        >>> sum(p.numel() for p in squeezenet1_0().parameters())
        1248424

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width_mult: scales every width, above 0; widths are then rounded by `round_channels`.
        small: for images of 32x32: the stem keeps the size of the image and is not pooled, so that 32x32 ends at 8x8 instead of 1x1. The
            weights have the same shapes either way.
        dropout: before the classifier, in [0, 1).

    Returns:
        The network, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size", arXiv:1602.07360.
    """
    check("squeezenet1_0", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, dropout=dropout)
    return SqueezeNet(
        (96, 7), (3, 7), num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, small=small, dropout=dropout
    )


def squeezenet1_1(
    *, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small: bool = False, dropout: float = 0.5
) -> nn.Module:
    """SqueezeNet 1.1 with random weights: a smaller stem, earlier pooling; its state dict has torchvision's names and shapes.

    Examples:
        >>> sum(p.numel() for p in squeezenet1_1().parameters())
        1235496

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width_mult: scales every width, above 0; widths are then rounded by `round_channels`.
        small: for images of 32x32: the stem keeps the size of the image and is not pooled, so that 32x32 ends at 8x8 instead of 1x1. The
            weights have the same shapes either way.
        dropout: before the classifier, in [0, 1).

    Returns:
        The network, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: the authors' second version of Iandola et al., "SqueezeNet", arXiv:1602.07360, published with their code.
    """
    check("squeezenet1_1", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, dropout=dropout)
    return SqueezeNet(
        (64, 3), (2, 4), num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, small=small, dropout=dropout
    )
