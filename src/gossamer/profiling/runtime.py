"""Running networks where they will run: ONNX Runtime sessions, feeds checked against the graph, threads, bytes on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.errors import UsageError
from gossamer.sources.batches import Batch

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES: Mapping[str, type] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
"""Input types of an ONNX graph and the NumPy types that fit them."""


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def session(path: str | os.PathLike[str], threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU: all graph optimisations, operators one after the other.

    Args:
        path: an ``.onnx`` file.
        threads: for each operator; None for every core.

    Returns:
        An ``onnxruntime.InferenceSession``.

    Raises:
        UsageError: the file is missing, or ONNX Runtime cannot load it.
    """
    return open_session(path, options(threads))


def options(threads: int | None = None) -> Any:
    """The ``onnxruntime.SessionOptions`` that every measurement shares."""
    import onnxruntime

    threads = cores() if threads is None else threads
    if threads < 1:
        raise UsageError(f"threads={threads}: at least 1 is needed")
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    chosen.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    chosen.log_severity_level = 3
    # Workers that spin after a run would take cores from the next artefact timed.
    chosen.add_session_config_entry("session.force_spinning_stop", "1")
    return chosen


def open_session(path: str | os.PathLike[str], chosen: Any) -> Any:
    """A session with the given ``onnxruntime.SessionOptions``; UsageError where the file is missing or cannot be loaded."""
    import onnxruntime

    file = Path(path)
    if not file.is_file():
        raise UsageError(f"no file {file}")
    try:
        return onnxruntime.InferenceSession(str(file), chosen, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise UsageError(f"ONNX Runtime cannot load {file}: {first_line(e)}") from e


def feed(loaded: Any, batch: Batch, *, name: str = "the graph") -> dict[str, Array]:
    """Inputs of a session by name, checked against what its graph declares.

    Args:
        loaded: an ``onnxruntime.InferenceSession``.
        batch: keyword inputs go by name, positional ones by order.
        name: of the artefact, for error messages.

    Raises:
        UsageError: the number, a name, a shape or a type does not fit; it names what is expected and what was given.
    """
    declared = loaded.get_inputs()
    given = list(batch.args) or list(batch.kwargs.values())
    if len(given) != len(declared):
        raise UsageError(f"{name} takes {len(declared)} inputs ({', '.join(i.name for i in declared)}), but {len(given)} were given")
    if batch.kwargs:
        unknown = [k for k in batch.kwargs if k not in {i.name for i in declared}]
        if unknown:
            raise UsageError(f"{name} has no input {unknown[0]!r}, it takes {', '.join(i.name for i in declared)}")
        given = [batch.kwargs[i.name] for i in declared]
    out = {}
    for want, value in zip(declared, given, strict=True):
        array = as_array(value)
        if len(array.shape) != len(want.shape) or any(isinstance(w, int) and w != g for w, g in zip(want.shape, array.shape, strict=True)):
            raise UsageError(f"{name}: input {want.name!r} has shape {shape_text(want.shape)}, but {shape_text(array.shape)} was given")
        if want.type in DTYPES and array.dtype != DTYPES[want.type]:
            raise UsageError(f"{name}: input {want.name!r} is {np.dtype(DTYPES[want.type]).name}, but {array.dtype.name} was given")
        out[want.name] = np.ascontiguousarray(array)
    return out


def run_onnx(loaded: Any, batch: Any, *, name: str = "the graph") -> list[Array]:
    """Run a session on one batch.

    Args:
        loaded: what `session` returns.
        batch: a `Batch`, a tensor, a tuple of positional inputs or a dict of keyword inputs; no target.
        name: of the artefact, for error messages.

    Returns:
        Every output, in the graph's order.

    Raises:
        UsageError: the inputs do not fit the graph.
    """
    inputs = feed(loaded, as_batch(batch), name=name)
    try:
        return list(loaded.run(None, inputs))
    except Exception as e:
        shapes = ", ".join(shape_text(v.shape) for v in inputs.values())
        raise UsageError(f"{name} fails in ONNX Runtime on inputs of shape {shapes}: {first_line(e)}") from e


def random_inputs(loaded: Any, *, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of the shapes a session's graph declares: normal noise, zeros for integers; free dimensions are 1."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for want in loaded.get_inputs():
        if want.type not in DTYPES:
            raise UsageError(f"input {want.name!r} is a {want.type}: pass example_inputs")
        dtype = torch.from_numpy(np.zeros(0, DTYPES[want.type])).dtype
        shape = [d if isinstance(d, int) else 1 for d in want.shape]
        noise = torch.randn(shape, generator=generator) if dtype.is_floating_point else torch.zeros(shape)
        made.append(noise.to(dtype))
    return tuple(made)


def as_batch(value: Any) -> Batch:
    """A tensor, a tuple of positional inputs or a dict of keyword inputs, as a `Batch` without target."""
    if isinstance(value, Batch):
        return value
    if isinstance(value, Mapping):
        return Batch((), dict(value), None)
    return Batch(tuple(value) if isinstance(value, tuple | list) else (value,), {}, None)


def as_array(value: Any) -> Array:
    """A tensor or anything array-like as a NumPy array."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def disk_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of an ``.onnx`` file, with the files of weights it refers to."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    file = Path(path)
    proto = onnx.load(str(file), load_external_data=False)
    others = {ExternalDataInfo(t).location for t in proto.graph.initializer if uses_external_data(t)}
    return sum(p.stat().st_size for p in (file, *(file.parent / o for o in others)))


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """PyTorch on so many threads (None for every core), and back to what it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores() if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The network in eval mode and without gradients; each module is back in its own mode afterwards."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield model
    finally:
        for module in training:
            module.training = True


def shape_text(shape: Any) -> str:
    """A shape as ``(N, 3, 224, 224)``; free dimensions are letters."""
    return "(" + ", ".join(str(d) if isinstance(d, int) else "N" if i == 0 else "?" for i, d in enumerate(shape)) + ")"


def first_line(error: BaseException) -> str:
    """An exception as one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
