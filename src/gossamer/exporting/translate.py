"""An exported torch program as an ONNX model: torch's exporter, with the quantised network's own operators translated one to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnxscript import opset21 as op

from gossamer.quantization import ops
from gossamer.trace.capture import Program, quiet

OPSET = 21
"""ONNX operator set of exported files."""


def _quantize_dequantize(x: Any, step: Any, zero_point: Any, low: int, high: int) -> Any:
    q = op.QuantizeLinear(x, step, zero_point)
    if (low, high) not in (
        (0, 255),
        (-128, 127),
        (0, 65535),
        (-32768, 32767),
    ):  # fewer than 8 bits: an 8-bit code held to the smaller range
        kind = onnx.TensorProto.INT8 if low < 0 else onnx.TensorProto.UINT8
        bounds = [op.Constant(value=onnx.helper.make_tensor("", kind, (), [bound])) for bound in (low, high)]
        q = op.Clip(q, *bounds)
    return op.DequantizeLinear(q, step, zero_point)


def _dequantize(q: Any, step: Any, zero_point: Any, axis: int | None) -> Any:
    return op.DequantizeLinear(q, step, zero_point, axis=1 if axis is None else axis)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.gossamer.quantize_dequantize.default: _quantize_dequantize,
    torch.ops.gossamer.dequantize.default: _dequantize,
}
"""How the operators of `gossamer.quantization.ops` are written in ONNX."""


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether a network holds integers that `gossamer.quantize` put there."""
    own = {torch.ops.gossamer.quantize_dequantize.default, torch.ops.gossamer.dequantize.default}
    graphs = [m.graph for m in model.modules() if isinstance(m, torch.fx.GraphModule)]
    return any(n.target in own for g in graphs for n in g.nodes)


def to_onnx(program: Program, *, input_names: Sequence[str], output_names: Sequence[str]) -> onnx.ModelProto:
    """Translate an exported program; what torch's exporter says on the way is held back."""
    assert ops.limits(8, True) == (-128, 127)  # the operators are registered
    with quiet(), torch.no_grad():
        translated = torch.onnx.export(
            program.exported,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(input_names),
            output_names=list(output_names),
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert translated is not None
    model: onnx.ModelProto = translated.model_proto
    return model
