"""Export: a network as a file for a runtime, run and compared there before it is handed over."""

from __future__ import annotations

from gossamer.exporting.divergence import first_divergence
from gossamer.exporting.onnx_file import Export, export
from gossamer.exporting.runtime import runtime_ops

__all__ = ["Export", "export", "first_divergence", "runtime_ops"]
