"""A small residual network for images of 8x8 to 32x32."""

from __future__ import annotations

from torch import Tensor, nn

from gossamer.errors import SourceError
from gossamer.models.blocks import BasicResidual, ConvBNAct


class ResNet8(nn.Module):
    """The network that `resnet8` builds; see there for the arguments."""

    def __init__(self, *, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.stem = ConvBNAct(in_channels, width)
        self.stages = nn.Sequential(
            BasicResidual(width, width),
            BasicResidual(width, 2 * width, stride=2),
            BasicResidual(2 * width, 4 * width, stride=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits, (N, num_classes)."""
        logits: Tensor = self.head(self.pool(self.stages(self.stem(x_NCHW))).flatten(1))
        return logits


def resnet8(*, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> nn.Module:
    """A residual network of eight weighted layers in a row: stem, three blocks of two (widths w, 2w, 4w; strides 1, 2, 2), linear head.

    Example:
        >>> import torch
        >>> resnet8(in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Args:
        num_classes: outputs, at least 1.
        in_channels: channels of the image, at least 1.
        width: channels of the first stage, at least 1.

    Returns:
        The network with random weights, in train mode as any new module.

    Raises:
        SourceError: an argument outside its range.

    Source: the design of He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, at one block a stage.
    """
    if num_classes < 1 or in_channels < 1 or width < 1:
        raise SourceError(f"resnet8 takes num_classes, in_channels and width of at least 1, not {num_classes}, {in_channels} and {width}")
    return ResNet8(num_classes=num_classes, in_channels=in_channels, width=width)
