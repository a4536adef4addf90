"""Networks of gossamer's own, built from small blocks."""

from gossamer.models.blocks import (
    BasicBlock,
    BasicResidual,
    Bottleneck,
    ChannelShuffle,
    ConvBNAct,
    DenseBlock,
    DenseLayer,
    DepthwiseSeparable,
    Fire,
    GhostBottleneck,
    GhostModule,
    GroupedShuffle,
    InvertedResidual,
    InvertedResidualSE,
    ShuffleUnit,
    SqueezeExcite,
    Transition,
    round_channels,
)
from gossamer.models.densenet import densenet121, densenet_bc100
from gossamer.models.ghostnet import ghostnet
from gossamer.models.mobilenet import mobilenet_v1, mobilenet_v2
from gossamer.models.mobilenet_v3 import mobilenet_v3_large, mobilenet_v3_small
from gossamer.models.registry import MODELS, build, input_side
from gossamer.models.resnet import resnet8, resnet18, resnet20, resnet34, resnet50
from gossamer.models.shufflenet import shufflenet_v2
from gossamer.models.squeezenet import squeezenet1_0, squeezenet1_1

__all__ = [
    "MODELS",
    "BasicBlock",
    "BasicResidual",
    "Bottleneck",
    "ChannelShuffle",
    "ConvBNAct",
    "DenseBlock",
    "DenseLayer",
    "DepthwiseSeparable",
    "Fire",
    "GhostBottleneck",
    "GhostModule",
    "GroupedShuffle",
    "InvertedResidual",
    "InvertedResidualSE",
    "ShuffleUnit",
    "SqueezeExcite",
    "Transition",
    "build",
    "densenet121",
    "densenet_bc100",
    "ghostnet",
    "input_side",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "round_channels",
    "shufflenet_v2",
    "squeezenet1_0",
    "squeezenet1_1",
]
