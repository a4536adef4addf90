"""Where an exported file of integers first computes something else than its simulation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gossamer.exporting.runtime import run, session

WRONG_DB = 20.0
"""Signal to error of a layer's output, given the file's own inputs to it, below which it diverges: a code that is off by one here and there gives 40."""


def first_divergence(model: nn.Module, path: str | Path, inputs: Any) -> tuple[str, float] | None:
    """The first layer, in execution order, that the runtime computes otherwise than the simulation does from the same inputs.

    Rounded outputs of layers are read from the runtime; the simulation takes each over after comparing it, so that a layer answers for itself alone.

    Args:
        model: the quantised network, an ``fx.GraphModule``.
        path: its exported file, weights under their names.
        inputs: positional inputs of a batch.

    Returns:
        The name of its weight and its signal to error in decibels, or None where every layer that can be compared agrees.

    Raises:
        ExportError: the file does not run.
    """
    assert isinstance(model, fx.GraphModule)
    file = onnx.load(path)
    made = _outputs_by_weight(file)
    own = {o.name for o in file.graph.output}
    for value, kind in {o: k for o, _, k in made.values() if o not in own}.items():
        file.graph.output.append(onnx.helper.make_tensor_value_info(value, kind, None))
    leaves = pytree.tree_leaves(inputs)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    feeds = {i.name: x.numpy() for i, x in zip(file.graph.input, tensors, strict=False)}
    got = dict(zip([o.name for o in file.graph.output], run(session(file.SerializeToString()), feeds), strict=True))
    values = {w: ((got[o].astype(np.float64) - zero) * step).astype(np.float32) for w, (o, (step, zero), _) in made.items()}
    watch = _Forced(model, _rounded_layers(model), values)
    with torch.no_grad():
        watch.run(*leaves, enable_io_processing=False)
    return watch.first


class _Forced(fx.Interpreter):
    """Runs the simulation; a layer's output is compared with the runtime's and then replaced by it."""

    def __init__(self, module: fx.GraphModule, layers: dict[fx.Node, str], values: dict[str, np.ndarray]) -> None:
        super().__init__(module)
        self.layers, self.values = layers, values
        self.first: tuple[str, float] | None = None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        theirs = self.values.get(self.layers.get(n, ""))
        if theirs is None or theirs.shape != tuple(result.shape):
            return result
        error = float((result.double() - torch.from_numpy(theirs)).square().sum())
        db = 10 * math.log10(max(float(result.double().square().sum()), 1e-30) / max(error, 1e-30))
        if db < WRONG_DB and self.first is None:
            self.first = (self.layers[n], db)
        return torch.from_numpy(theirs)


def _rounded_layers(model: fx.GraphModule) -> dict[fx.Node, str]:
    """Where the output of each quantised layer is rounded, and the name of its weight."""
    from gossamer.quantization.graph import CLIP, op_name, weighted_nodes

    rounding = torch.ops.gossamer.quantize_dequantize.default
    found: dict[fx.Node, str] = {}
    for layer in weighted_nodes(model.graph):
        stored, reader = layer.args[1], layer
        if not isinstance(stored, fx.Node) or stored.target is not torch.ops.gossamer.dequantize.default:
            continue
        while len(reader.users) == 1 and (reader is layer or op_name(reader) in CLIP):
            reader = next(iter(reader.users))
        if reader.target is rounding:
            found[reader] = str(stored.args[0].target)  # type: ignore[union-attr]
    return found


def _outputs_by_weight(file: onnx.ModelProto) -> dict[str, tuple[str, tuple[float, int], int]]:
    """Integer output, its step and zero point, and its type, of each layer whose weight has a name."""
    constants = {t.name: t for t in file.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    maker: dict[str, onnx.NodeProto] = {}
    for node in file.graph.node:
        maker.update(dict.fromkeys(node.output, node))
        for i in node.input:
            readers.setdefault(i, []).append(node)
    out = {}
    for node in file.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        dequantised = maker.get(node.input[1])
        if dequantised is None or dequantised.op_type != "DequantizeLinear":
            continue
        after = readers.get(node.output[0], [])
        while len(after) == 1 and after[0].op_type in ("Relu", "Clip", "Add"):
            after = readers.get(after[0].output[0], [])
        if len(after) != 1 or after[0].op_type != "QuantizeLinear" or len(after[0].input) < 3:
            continue
        scale, zero = (constants.get(i) for i in after[0].input[1:3])
        if scale is None or zero is None:
            continue
        step, point = float(numpy_helper.to_array(scale)), numpy_helper.to_array(zero)
        kind = TensorProto.UINT8 if point.dtype == np.uint8 else TensorProto.INT8
        out[dequantised.input[0]] = (after[0].output[0], (step, int(point)), kind)
    return out
