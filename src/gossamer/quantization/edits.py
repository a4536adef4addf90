"""From ranges, weights and bit widths to the edits of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from gossamer.plan import QuantizeActivation, QuantizeWeight
from gossamer.quantization.build import least_steps
from gossamer.quantization.graph import CONVOLUTION, LINEAR, bias_node, channel_axis, op_name, tensor_at, weight_name
from gossamer.quantization.observers import Histogram, affine
from gossamer.quantization.points import Points, source
from gossamer.quantization.steps import minmax_steps, mse_steps

STEPS = ("mse", "minmax")


def activation_edit(point: str, histogram: Histogram, observer: str, bits: int) -> QuantizeActivation:
    """How one activation is rounded. At 16 bits the range is the whole one: nothing is gained by clipping."""
    step, zero = affine(*histogram.range(observer if bits <= 8 else "minmax", bits), bits)
    return QuantizeActivation(point=point, bits=bits, signed=False, step=step, zero_point=zero)


def weight_edits(
    module: fx.GraphModule,
    points: Points,
    rounded: Mapping[fx.Node, QuantizeActivation],
    bits: Mapping[str, int],
    *,
    step: str = "mse",
    per_channel: bool = True,
    signed: bool = True,
) -> list[QuantizeWeight]:
    """How each weight is stored; steps are no smaller than the bias, held in int32, allows."""
    uses: dict[str, list[fx.Node]] = {}
    for layer in points.layers:
        uses.setdefault(str(weight_name(layer)), []).append(layer)
    edits = []
    for name, layers in uses.items():
        w, width = tensor_at(module, name).detach(), bits[name]
        axis = channel_axis(layers[0]) if per_channel else None
        steps = (mse_steps if step == "mse" else minmax_steps)(w, width, axis)
        for layer in layers:
            inputs = _rounding_before(layer, rounded)
            bias: Any = bias_node(layer)
            if inputs and isinstance(bias, fx.Node) and bias.op == "get_attr" and op_name(layer) in CONVOLUTION | LINEAR:
                least = least_steps(tensor_at(module, str(bias.target)).detach(), inputs.step)
                steps = torch.maximum(steps, least if per_channel else least.max())
        values = tuple(float(f"{s:.7g}") for s in steps.reshape(-1).tolist())
        zero = 0 if signed else 1 << (width - 1)
        edits.append(QuantizeWeight(tensor=name, bits=width, axis=axis, signed=signed, steps=values, zero_points=(zero,) * len(values)))
    return edits


def with_steps_of(module: fx.GraphModule, edits: list[QuantizeWeight]) -> list[QuantizeWeight]:
    """The edits with the steps that a built network holds, exactly."""
    out = []
    for edit in edits:
        steps = tuple(float(f"{s:.9g}") for s in tensor_at(module, edit.tensor + "_step").reshape(-1).tolist())
        out.append(edit.model_copy(update={"steps": steps}))
    return out


def _rounding_before(layer: fx.Node, rounded: Mapping[fx.Node, QuantizeActivation]) -> QuantizeActivation | None:
    assert isinstance(layer.args[0], fx.Node)
    return rounded.get(source(layer.args[0]))
