"""A network as one graph of tensor operations, through torch.export: what quantisation rewrites and export writes down."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from gossamer.errors import ExportError, TraceError
from gossamer.sources.batches import call, check_inputs
from gossamer.trace.inplace import without_inplace


@dataclass(frozen=True)
class Program:
    """An exported network.

    Attributes:
        exported: what torch.export returned, without in-place operations.
        dynamic: whether any batch size can be run.
        notes: one line where something could not be kept.
    """

    exported: torch.export.ExportedProgram
    dynamic: bool
    notes: tuple[str, ...] = ()


def capture(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """Capture a network in eval mode as a graph of ATen operations without in-place ones.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
        >>> graph = capture(net, (torch.zeros(1, 4),))
        >>> [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        ['aten.linear.default', 'aten.relu.default']
        >>> sorted(graph.state_dict()), graph(torch.zeros(5, 4)).shape
        (['0.bias', '0.weight'], torch.Size([5, 3]))

    Args:
        model: the network; it is not changed, and stays in its mode.
        example_inputs: a tuple of positional inputs, or a dict of keyword inputs. Dimension 0 of the first one is the batch; every
            input of the same size there shares it.

    Returns:
        A graph module that takes and returns what ``model`` does. Parameters and buffers keep their state-dict names.
        ``meta["dynamic_batch"]`` says whether it takes any batch size, ``meta["notes"]`` (a tuple of lines) why not.

    Raises:
        ExportError: the network cannot be written as one graph (its forward branches on a tensor's value, for example).
        TraceError: the network's own forward pass fails on the example inputs.
    """
    program = export_program(model, example_inputs)
    module: Any = program.exported.module(check_guards=False)
    graph = fx.GraphModule(module, module.graph, class_name="Captured")
    graph.meta["dynamic_batch"], graph.meta["notes"] = program.dynamic, program.notes
    return graph


def export_program(model: nn.Module, example_inputs: Any) -> Program:
    """The same as `capture`, as a torch ``ExportedProgram``."""
    inputs = check_inputs(example_inputs)
    model = copy.deepcopy(model).eval()
    wide, batch = _widened(inputs)
    failure = None
    if batch is not None:
        try:
            return Program(_export(model, wide, batch), True)
        except GuardOnDataDependentSymNode as e:
            raise ExportError(_why(e)) from None
        except Exception as e:  # torch.export raises many kinds; the static attempt below decides
            failure = e
    try:
        exported = _export(model, inputs, None)
    except Exception as e:
        with torch.no_grad():
            try:
                call(model, inputs)
            except Exception as own:
                raise TraceError(f"the network's forward pass fails on the example inputs: {_line(own)}") from None
        raise ExportError(_why(e)) from None
    size = next((t.shape[0] for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), None)
    note = "no input has a batch dimension" if failure is None else f"batch size fixed at {size}: {_line(failure)}"
    return Program(exported, False, (note,))


def export_static(model: nn.Module, example_inputs: Any) -> torch.export.ExportedProgram:
    """The network as a torch ``ExportedProgram`` for the shapes of the example inputs, batch size included; raises as `capture`."""
    inputs = check_inputs(example_inputs)
    try:
        return _export(copy.deepcopy(model).eval(), inputs, None)
    except Exception as e:  # torch.export raises many kinds
        raise ExportError(_why(e)) from None


def _export(model: nn.Module, inputs: Any, batch: int | None) -> torch.export.ExportedProgram:
    shared = torch.export.Dim("batch")
    dims = pytree.tree_map(lambda t: {0: shared} if batch is not None and _has_batch(t, batch) else None, inputs)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    with quiet(), torch.no_grad(), _plain_attention():
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=dims if batch is not None else None, strict=False)
        without_inplace(exported.graph)
        return exported.run_decompositions({})


def _has_batch(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch


def _widened(inputs: Any) -> tuple[Any, int | None]:
    """Inputs of a batch of at least 2, since torch.export takes a size of 1 for a constant; and that batch size."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    batch = next((t.shape[0] for t in tensors if t.dim()), None)
    if batch is None or batch > 1:
        return inputs, batch
    return pytree.tree_map(lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if _has_batch(t, batch) else t, inputs), 2 * batch or None


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Transformer layers as ordinary operations, not as one fused one that no exporter knows."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back torch's warnings and log lines inside; what goes wrong is raised as an error."""
    names = (
        "torch",
        "torch.onnx",
        "torch.export",
        "torch.fx",
        "torch.fx.experimental.symbolic_shapes",
        "torch._export",
        "onnxscript",
        "onnx_ir",
    )
    loggers = [logging.getLogger(n) for n in names]
    before = [(log.level, log.disabled) for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, (level, disabled) in zip(loggers, before, strict=True):
            log.setLevel(level)
            log.disabled = disabled


def _line(error: BaseException) -> str:
    lines = [s.strip() for s in str(error).splitlines() if s.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _why(error: Exception) -> str:
    if isinstance(error, GuardOnDataDependentSymNode):
        return (
            "the network cannot be exported: its forward pass branches on a tensor's value (Python control flow); "
            "use torch.where or torch.cond, or move the branch out of forward"
        )
    return f"the network cannot be exported: {_line(error)}"
