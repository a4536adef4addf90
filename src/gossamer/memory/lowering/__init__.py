"""From a captured graph to steps that read and write views of buffers."""

from gossamer.memory.lowering.building import build

__all__ = ["build"]
