"""An exported torch program as an ONNX model: torch's exporter, with the quantised network's own operators translated one to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnxscript import opset21 as op
from onnxscript import values

from gossamer.quantization import layer_ops, ops
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


def _dynamic_linear(x: Any, q: Any, step: Any, zero_point: Any, bias: Any) -> Any:
    rounded, x_step, x_zero = op.DynamicQuantizeLinear(x)
    zero = op.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.INT8, (), [0])) if zero_point is None else _only(zero_point)
    sums = op.Cast(op.MatMulInteger(rounded, op.Transpose(q, perm=[1, 0]), x_zero, zero), to=onnx.TensorProto.FLOAT)
    y = op.Mul(sums, op.Mul(x_step, step))
    return y if bias is None else op.Add(y, bias)


def _only(zero_points: Any) -> Any:
    """One zero point for all channels, which have the same."""
    first = op.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.INT64, (), [0]))
    return op.Gather(zero_points, first)


def _grouped_linear(x: Any, q: Any, step: Any, bias: Any, group: int, bits: int) -> Any:
    codes = op.Transpose(q, perm=[1, 0])
    if bits == 4:
        codes = op.Cast(codes, to=onnx.TensorProto.INT4)
    w = op.DequantizeLinear(codes, op.Transpose(step, perm=[1, 0]), axis=0, block_size=group)
    y = op.MatMul(x, w)
    if bias is None:
        return y
    flat = (
        x.shape is not None and len(x.shape) == 2
    )  # there the runtime would make a float Gemm of product and sum, with the weight unpacked at every run
    return op.Sub(y, op.Neg(bias)) if flat else op.Add(y, bias)


def _table(q: Any, step: Any, zero_point: Any, index: Any) -> Any:
    last = op.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.INT64, (1,), [-1]))
    rows = op.Cast(op.Gather(q, index), to=onnx.TensorProto.FLOAT)
    if zero_point is not None:
        rows = op.Sub(rows, op.Cast(op.Unsqueeze(op.Gather(zero_point, index), last), to=onnx.TensorProto.FLOAT))
    return op.Mul(rows, op.Unsqueeze(op.Gather(step, index), last))


def _lstm_operator() -> Any:
    """ONNX Runtime's LSTM on integer weights, an operator of its own."""
    schema = onnx.defs.OpSchema
    inputs = "X W R B sequence_lens initial_h initial_c P W_scale W_zero_point R_scale R_zero_point".split()
    kinds = {"sequence_lens": "tensor(int32)", "W": "Q", "R": "Q", "W_zero_point": "Q", "R_zero_point": "Q"}
    optional = schema.FormalParameterOption.Optional
    return values.Op(
        values.Opset("com.microsoft", 1),
        "DynamicQuantizeLSTM",
        schema(
            "DynamicQuantizeLSTM",
            "com.microsoft",
            1,
            inputs=[schema.FormalParameter(n, kinds.get(n, "tensor(float)"), param_option=optional) for n in inputs],
            outputs=[schema.FormalParameter(n, "tensor(float)", param_option=optional) for n in ("Y", "Y_h", "Y_c")],
            type_constraints=[("Q", ["tensor(int8)", "tensor(uint8)"], "")],
            attributes=[schema.Attribute("hidden_size", schema.AttrType.INT), schema.Attribute("direction", schema.AttrType.STRING)],
        ),
    )


def _dynamic_lstm(x: Any, h: Any, c: Any, w: Any, r: Any, w_step: Any, r_step: Any, bias: Any, zero: int) -> Any:
    directions, hidden = r.shape[0], r.shape[1]
    kind = onnx.TensorProto.UINT8 if zero else onnx.TensorProto.INT8
    points = op.Constant(value=onnx.helper.make_tensor("", kind, (directions, 4 * hidden), [zero] * (directions * 4 * hidden)))
    direction = "bidirectional" if directions == 2 else "forward"
    y, last_h, last_c = _lstm_operator()(
        x, w, r, bias, None, h, c, None, w_step, points, r_step, points, hidden_size=hidden, direction=direction
    )
    rows = op.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.INT64, (3,), [0, 0, -1]))
    return op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), rows), last_h, last_c


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.gossamer.quantize_dequantize.default: _quantize_dequantize,
    torch.ops.gossamer.dequantize.default: _dequantize,
    torch.ops.gossamer.dynamic_linear.default: _dynamic_linear,
    torch.ops.gossamer.grouped_linear.default: _grouped_linear,
    torch.ops.gossamer.table.default: _table,
    torch.ops.gossamer.dynamic_lstm.default: _dynamic_lstm,
}
"""How the operators of `gossamer.quantization.ops` are written in ONNX."""


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether a network holds integers that `gossamer.quantize` put there."""
    graphs = [m.graph for m in model.modules() if isinstance(m, torch.fx.GraphModule)]
    return any(n.target in TRANSLATIONS for g in graphs for n in g.nodes)


def to_onnx(program: Program, *, input_names: Sequence[str], output_names: Sequence[str]) -> onnx.ModelProto:
    """Translate an exported program; what torch's exporter says on the way is held back."""
    assert ops.limits(8, True) == (-128, 127) and layer_ops.table  # the operators are registered
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
