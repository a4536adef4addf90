"""Building blocks of convolutional networks."""

from gossamer.models.blocks.convolution import ConvBNAct, DepthwiseSeparable, Fire, SqueezeExcite, round_channels
from gossamer.models.blocks.dense import DenseBlock, DenseLayer, Transition
from gossamer.models.blocks.ghost import GhostBottleneck, GhostModule
from gossamer.models.blocks.inverted import InvertedResidual, InvertedResidualSE
from gossamer.models.blocks.residual import BasicBlock, BasicResidual, Bottleneck
from gossamer.models.blocks.shuffle import ChannelShuffle, GroupedShuffle, ShuffleUnit

__all__ = [
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
    "round_channels",
]
