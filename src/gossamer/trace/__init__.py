"""Watch one forward pass: which channels belong together, what is frozen and why, what each layer costs. See README.md."""

from gossamer.trace._trace import Trace, channels, costs, plain_forward, trace
from gossamer.trace.channels import Axis, ChannelGroup, ChannelMap

__all__ = ["Axis", "ChannelGroup", "ChannelMap", "Trace", "channels", "costs", "plain_forward", "trace"]
