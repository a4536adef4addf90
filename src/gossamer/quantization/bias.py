"""Bias correction without data: means of activations from the batch norms that made them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from gossamer.quantization.equalization import clip_of
from gossamer.quantization.graph import AVERAGE, CLIP, CONVOLUTION, LINEAR, op_name, tensor_at, weight_name, weighted_nodes
from gossamer.quantization.moments import geometry
from gossamer.quantization.ops import dequantize
from gossamer.quantization.points import source
from gossamer.quantization.reconstruction import shift_bias


def correct_analytically(floating: fx.GraphModule, quantised: fx.GraphModule) -> str:
    """Shift each bias by ``-(W_q - W) E[x]``, with ``E[x]`` that of a clipped normal variable whose mean and deviation the batch norm sets.

    Args:
        floating: the canonical float graph; layers that a batch norm was folded into carry its parameters.
        quantised: what was built from a copy of it; its bias codes are changed in place.

    Returns:
        A note that says how many layers were corrected.

    Source:
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2.1 and appendix C.
    """
    ours = {n.name: n for n in floating.graph.nodes}
    corrected = total = 0
    with torch.no_grad():
        for layer in weighted_nodes(quantised.graph):
            original = ours.get(layer.name)
            if original is None or op_name(layer) not in CONVOLUTION | LINEAR or weight_name(original) is None:
                continue
            total += 1
            name = str(weight_name(original))
            w = tensor_at(floating, name)
            shape, mean_C = geometry(original, w), _mean(original.args[0])
            stored = layer.args[1]
            if (
                shape is None
                or mean_C is None
                or not isinstance(stored, fx.Node)
                or stored.target is not torch.ops.gossamer.dequantize.default
            ):
                continue
            zero = tensor_at(quantised, name + "_zero_point") if stored.args[2] is not None else None
            error = dequantize(tensor_at(quantised, name), tensor_at(quantised, name + "_step"), zero, stored.args[3]) - w
            by_input = shape.rows(error).reshape(shape.groups, shape.outputs, mean_C.numel() // shape.groups, -1).sum(3)
            shift = -(by_input * mean_C.view(shape.groups, 1, -1)).sum(2).reshape(-1)
            corrected += shift_bias(quantised, layer, shift)
    return f"biases of {corrected} of {total} layers corrected from batch norms; the others' inputs have no known mean"


def clipped_normal_mean(mean: Tensor, deviation: Tensor, low: float | None, high: float | None) -> Tensor:
    """Mean of a normal variable clipped to ``[low, high]``; None for no end.

    Examples:
        >>> clipped_normal_mean(torch.tensor([0.0, 9.0]), torch.tensor([1.0, 1.0]), 0.0, 6.0)
        tensor([0.3989, 5.9996])

    Source: with ``a`` and ``b`` the ends in deviations, ``low P(a) + high (1 - P(b)) + mean (P(b) - P(a)) + deviation (p(a) - p(b))``.
    """
    normal = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    deviation = deviation.clamp(min=1e-12)
    zero, one = torch.zeros_like(mean), torch.ones_like(mean)
    a, b = (None if end is None else (end - mean) / deviation for end in (low, high))
    below, above = zero if a is None else normal.cdf(a), one if b is None else normal.cdf(b)
    density_a, density_b = (zero if end is None else normal.log_prob(end).exp() for end in (a, b))
    return (low or 0.0) * below + (high or 0.0) * (1 - above) + mean * (above - below) + deviation * (density_a - density_b)


def _mean(node: object) -> Tensor | None:
    """Mean of each channel of a value, where batch norms say so."""
    if not isinstance(node, fx.Node):
        return None
    node = source(node)
    low: float | None = None
    high: float | None = None
    while op_name(node) in CLIP and isinstance(node.args[0], fx.Node):
        floor, ceiling = clip_of(node)
        low = floor if low is None else max(low, floor) if floor is not None else low
        high = ceiling if high is None else min(high, ceiling) if ceiling is not None else high
        node = node.args[0]
    if op_name(node) in AVERAGE and low is None and high is None:
        return _mean(node.args[0])
    if op_name(node) == "add" and low is None and high is None and len(node.args) == 2:
        terms = [_mean(a) for a in node.args]
        return None if any(t is None for t in terms) else terms[0] + terms[1]  # type: ignore[operator]
    if "normal" not in node.meta:
        return None
    mean, deviation = node.meta["normal"]
    return clipped_normal_mean(mean, deviation, low, high)
