"""Kernels that write where they are told."""

from gossamer.memory.kernels.binding import Bound
from gossamer.memory.kernels.builders import ALLOCATION_FREE, KERNEL_BYTES, bind, scratch_bytes
from gossamer.memory.kernels.convolutions import packed

__all__ = ["ALLOCATION_FREE", "KERNEL_BYTES", "Bound", "bind", "packed", "scratch_bytes"]
