"""Networks of gossamer's own, built from small blocks."""

from gossamer.models.blocks import BasicResidual, ConvBNAct, DepthwiseSeparable, InvertedResidual, round_channels
from gossamer.models.mobilenet import mobilenet_v2
from gossamer.models.registry import MODELS, build
from gossamer.models.resnet import resnet8

__all__ = [
    "MODELS",
    "BasicResidual",
    "ConvBNAct",
    "DepthwiseSeparable",
    "InvertedResidual",
    "build",
    "mobilenet_v2",
    "resnet8",
    "round_channels",
]
