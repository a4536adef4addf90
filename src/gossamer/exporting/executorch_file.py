"""Writing a network as one ``.pte`` file for ExecuTorch: XNNPACK runs what it can, portable kernels the rest, in buffers planned here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gossamer.errors import ExportError, UsageError
from gossamer.exporting.executorch_graph import xnnpack_form
from gossamer.exporting.executorch_runtime import Method, check_loads, load_runtime
from gossamer.exporting.parity import compare, fixed_batches, noise
from gossamer.exporting.translate import is_quantized
from gossamer.memory.executorch import executorch_memory
from gossamer.trace.capture import export_static, quiet

RUNS, SECONDS = 50, 1.0  # of timing, at most


def lower(model: nn.Module, inputs: Any) -> tuple[bytes, tuple[str, ...]]:
    """A network as the bytes of a ``.pte`` program for the batch size of its inputs, and lines worth knowing.

    Raises:
        UsageError: ExecuTorch is not installed.
        ExportError: ExecuTorch cannot hold the network.
    """
    load_runtime()
    inputs = pytree.tree_map(
        lambda x: x.contiguous() if isinstance(x, Tensor) else x, inputs
    )  # a program insists on the layout it was made for
    notes: tuple[str, ...] = ()
    if is_quantized(model):
        model, notes = xnnpack_form(model)
    exported = export_static(model, inputs)
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

        try:
            edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            outside = _outside(edge.exported_program())
            program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=executorch_memory()))
        except Exception as e:  # ExecuTorch raises many kinds
            raise ExportError(f"the network cannot be written for ExecuTorch: {_line(e)}") from None
    if outside:
        named = ", ".join(f"{n} {op}" for op, n in outside.most_common(6))
        notes = (*notes, f"not run by XNNPACK but by ExecuTorch's portable kernels: {named}{', ...' if len(outside) > 6 else ''}")
    return program.buffer, notes


def write(model: nn.Module, inputs: Any, path: Path, *, calibration: Iterable[Any] | None) -> tuple[Any, float, tuple[str, ...]]:
    """Write a file, run it in ExecuTorch, and compare it with the network.

    Returns:
        How it agrees, its median latency in milliseconds on one thread, and lines worth knowing.
    """
    program, notes = lower(model, inputs)
    try:
        path.write_bytes(program)
    except OSError as e:
        raise UsageError(f"cannot write {path.name}: {e.strerror}") from None
    check_loads(path)
    method = Method(path, threads=1)
    batches = [*fixed_batches(calibration, inputs), noise(inputs)]
    agreement = compare(model, lambda leaves: method.run(_tensors(leaves)), batches)
    return agreement, _latency_ms(method, _tensors(pytree.tree_leaves(inputs))), notes


def _tensors(leaves: Iterable[Any]) -> list[Tensor]:
    return [x.contiguous() for x in leaves if isinstance(x, Tensor)]


def _latency_ms(method: Method, inputs: list[Tensor]) -> float:
    """Median of runs after three that are not timed."""
    times: list[float] = []
    for i in range(RUNS + 3):
        begun = time.perf_counter()
        method.run(inputs)
        if i >= 3:
            times.append(time.perf_counter() - begun)
        if i >= 7 and sum(times) > SECONDS:
            break
    return 1e3 * float(np.median(times))


def _outside(program: Any) -> Counter[str]:
    """Operations that no delegate runs, by name."""
    calls = (n for n in program.graph.nodes if n.op == "call_function")
    names = (str(getattr(n.target, "__name__", n.target)).removesuffix(".default").split(".") for n in calls)
    named = (parts[min(1, len(parts) - 1)] for parts in names)  # aten.mean.dim, getitem
    return Counter(n for n in named if n not in ("executorch_call_delegate", "getitem"))


def _line(error: BaseException) -> str:
    lines = [s.strip() for s in str(error).splitlines() if s.strip()]
    return lines[0][:200] if lines else type(error).__name__
