"""Latency as a target: a fraction of what the original takes in ONNX Runtime, or milliseconds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from gossamer.errors import UsageError
from gossamer.profiling.latency import Timing, benchmark


def latency_fraction(target: float | str, model: nn.Module, example_inputs: Any, *, threads: int = 1) -> float:
    """A latency target as a fraction of the original's: ``0.5``, or ``"5ms"`` against what the original takes in ONNX Runtime."""
    if isinstance(target, int | float):
        return float(target)
    found = re.fullmatch(r"\s*([0-9.]+)\s*ms\s*", target)
    if not found:
        raise UsageError(f"latency={target!r}: give a fraction of the original's, such as 0.5, or milliseconds, such as '5ms'")
    return float(found[1]) / _times([model], example_inputs, threads)[0].median_ms


def measured_fraction(original: nn.Module, changed: nn.Module, example_inputs: Any, *, threads: int = 1) -> tuple[float, str]:
    """Latency of a changed network as a fraction of the original's, interleaved in ONNX Runtime, and a line that says so."""
    before, after = _times([original, changed], example_inputs, threads)
    return after.ratio, (
        f"latency {after.median_ms:.2f} ms against {before.median_ms:.2f} ms: {after.ratio:.2f} of the original "
        f"({after.ratio_p10:.2f} to {after.ratio_p90:.2f}), ONNX Runtime, {threads} thread{'s' if threads > 1 else ''}"
    )


def _times(networks: Sequence[nn.Module], example_inputs: Any, threads: int) -> Sequence[Timing]:
    return benchmark(*networks, example_inputs=example_inputs, threads=threads).rows
