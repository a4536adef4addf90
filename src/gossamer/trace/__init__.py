"""Watch one forward pass: which channels belong together, what is frozen and why, what each layer costs. See README.md."""

from gossamer.trace._rules import rule_of
from gossamer.trace._sites import Site, Sites
from gossamer.trace._trace import Trace, channels, costs, plain_forward, trace
from gossamer.trace._watch import Step, scalars_of
from gossamer.trace.channels import Axis, ChannelGroup, ChannelMap

__all__ = [
    "Axis",
    "ChannelGroup",
    "ChannelMap",
    "Site",
    "Sites",
    "Step",
    "Trace",
    "channels",
    "costs",
    "plain_forward",
    "rule_of",
    "scalars_of",
    "trace",
]
