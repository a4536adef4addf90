"""ShuffleNetV2, with torchvision's parameter names, any width, and a variant for small images."""

from __future__ import annotations

from torch import Tensor, nn

from gossamer.models.blocks import ConvBNAct, ShuffleUnit, round_channels
from gossamer.models.options import check, initialise

WIDTHS: dict[float, tuple[int, int, int, int]] = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
"""Output channels of the three stages and of the last convolution, by width: table 5 of the paper."""

UNITS = (4, 8, 4)
"""Units of each stage."""


class ShuffleNetV2(nn.Module):
    """The network that `shufflenet_v2` builds; see there for the arguments."""

    def __init__(self, *, num_classes: int, in_channels: int, width_mult: float, small: bool) -> None:
        super().__init__()
        *widths, last = WIDTHS.get(width_mult) or _scaled(width_mult)
        channels = 24 if width_mult >= 0.5 else round_channels(48 * width_mult)
        self.conv1 = ConvBNAct(in_channels, channels, stride=1 if small else 2)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        stages = []
        for width, units in zip(widths, UNITS, strict=True):
            stages.append(nn.Sequential(ShuffleUnit(channels, width, stride=2), *(ShuffleUnit(width, width) for _ in range(units - 1))))
            channels = width
        self.stage2, self.stage3, self.stage4 = stages
        self.conv5 = ConvBNAct(channels, last, kernel=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, num_classes)
        initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits, (N, num_classes)."""
        x_NCHW = self.maxpool(self.conv1(x_NCHW))
        x_NCHW = self.stage4(self.stage3(self.stage2(x_NCHW)))
        logits: Tensor = self.fc(self.pool(self.conv5(x_NCHW)).flatten(1))
        return logits


def _scaled(width_mult: float) -> tuple[int, int, int, int]:
    """Widths between the published ones: even, doubling from stage to stage."""
    first = max(2, 2 * round(58 * width_mult))
    return first, 2 * first, 4 * first, 1024 if 0.5 <= width_mult < 2 else round_channels((2048 if width_mult < 0.5 else 1024) * width_mult)


def shufflenet_v2(*, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small: bool = False) -> nn.Module:
    """ShuffleNetV2 with random weights; at the four published widths its state dict has torchvision's names and shapes.

    Examples:
        >>> sum(p.numel() for p in shufflenet_v2().parameters())
        2278604

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width_mult: 0.5, 1.0, 1.5 and 2.0 are the published networks; any other number above 0 scales the stages of 1.0, and below 0.5 the
            stem and the last convolution of 0.5 too.
        small: for images of 32x32: the stem keeps the size of the image and is not pooled, so that 32x32 ends at 4x4 instead of 1x1. The
            weights have the same shapes either way.

    Returns:
        The network, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018.
    """
    check("shufflenet_v2", num_classes=num_classes, in_channels=in_channels, width_mult=width_mult)
    return ShuffleNetV2(num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, small=small)
