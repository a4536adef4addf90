"""Running an exported file in ONNX Runtime, and asking it which kernels it chose."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from gossamer.errors import ExportError


def session(path: str | Path | bytes, *, optimized: str | Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU, with all of its graph optimisations.

    Args:
        path: the ``.onnx`` file.
        optimized: where the runtime writes the graph it will really run.

    Raises:
        ExportError: the runtime does not load the file.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return ort.InferenceSession(path if isinstance(path, bytes) else str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime raises classes of its own, one for each status
        raise ExportError(f"ONNX Runtime does not load the file: {str(e).splitlines()[0][:200]}") from None


def run(running: Any, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of a session, in order; ExportError where the run fails."""
    names = {i.name for i in running.get_inputs()}
    try:
        return list(running.run(None, {k: v for k, v in feeds.items() if k in names}))
    except Exception as e:
        raise ExportError(f"ONNX Runtime does not run the file: {str(e).splitlines()[0][:200]}") from None


def runtime_ops(path: str | Path) -> Counter[str]:
    """What ONNX Runtime makes of a file: how often each operator occurs in the graph that it really runs.

    A convolution that runs in integers is a ``QLinearConv``; one that does not is a ``Conv`` between ``DequantizeLinear`` and
    ``QuantizeLinear``.

    Args:
        path: the ``.onnx`` file.

    Returns:
        Counts by operator type.

    Raises:
        ExportError: the runtime does not load the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimized.onnx"
        session(path, optimized=written)
        return Counter(n.op_type for n in onnx.load(written).graph.node)
