"""Outlying features of a linear layer's input, moved into its weight before the input is rounded with one step. K features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from gossamer.errors import UsageError
from gossamer.quantization.graph import op_name, tensor_at, weight_name

_SPREAD = 4.0  # standard deviations that a feature is taken to reach
_POWER = 0.8  # how much of an outlier is moved into the weight
_LEAST = 2.0  # largest factor below which there is nothing to move


def factors(range_K: Tensor) -> tuple[float, ...]:
    """What features are divided by: ``max(1, range / median)^0.8``; none where no feature stands out.

    Examples:
        >>> factors(torch.tensor([1.0, 1.0, 32.0])), factors(torch.ones(3))
        ((1.0, 1.0, 16.0), ())

    Source: after Xiao et al., "SmoothQuant", ICML 2023, arXiv:2211.10438, section 4, here of outliers alone.
    """
    middle = range_K.median()
    if not float(middle) > 0:
        return ()
    found = (range_K / middle).clamp(min=1).pow(_POWER)
    return tuple(float(f"{v:.5g}") for v in found.tolist()) if float(found.max()) >= _LEAST else ()


def estimated_range(module: fx.GraphModule, value: Any) -> Tensor | None:
    """How far each feature of a value reaches, from weights alone: behind a layer norm, or a linear layer after one and its activation.

    Normalised features have mean 0 and deviation 1, so that ``gamma x + beta`` reaches ``4 |gamma| + |beta|``, and a linear layer of it has mean
    ``W beta + b`` and deviation ``|W gamma|``, were features independent. None for anything else.
    """
    op = op_name(value) if isinstance(value, fx.Node) else ""
    if op == "layer_norm":
        moments = _moments(module, value)
        return None if moments is None else moments[0].abs() + _SPREAD * moments[1]
    if op in ("gelu", "relu", "silu"):
        moments = _moments(module, value.args[0])
        if moments is None:
            return None
        mean, deviation = moments
        reach = torch.stack([mean + _SPREAD * deviation, mean - _SPREAD * deviation])
        out: Tensor = getattr(torch.ops.aten, op).default(reach)
        return out.abs().amax(0)
    return None


def _moments(module: fx.GraphModule, value: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of each feature."""
    if not isinstance(value, fx.Node):
        return None
    if op_name(value) == "layer_norm":
        scale, shift = (value.args[2] if len(value.args) > 2 else None), (value.args[3] if len(value.args) > 3 else None)
        if not (isinstance(scale, fx.Node) and scale.op == "get_attr" and len(value.args[1]) == 1):  # type: ignore[arg-type]
            return None
        gamma = tensor_at(module, str(scale.target)).detach()
        beta = tensor_at(module, str(shift.target)).detach() if isinstance(shift, fx.Node) else torch.zeros_like(gamma)
        return beta, gamma.abs()
    if op_name(value) == "linear" and weight_name(value):
        before = _moments(module, value.args[0])
        if before is None:
            return None
        w = tensor_at(module, str(weight_name(value))).detach()
        bias = value.args[2] if len(value.args) > 2 else None
        b = tensor_at(module, str(bias.target)).detach() if isinstance(bias, fx.Node) and bias.op == "get_attr" else 0.0
        return w @ before[0] + b, (w * before[1]).square().sum(1).sqrt()
    return None


def measured_ranges(module: fx.GraphModule, nodes: Iterable[fx.Node], batches: Iterable[list[Any]]) -> dict[fx.Node, Tensor]:
    """Largest magnitude of each feature of the inputs of some linear layers, over flat inputs of the graph."""
    watching = _Features(module, [n.args[0] for n in nodes])
    empty = True
    with torch.no_grad():
        for leaves in batches:
            watching.run(*leaves, enable_io_processing=False)
            empty = False
    if empty:
        raise UsageError("the calibration data is empty: give at least one batch")
    return watching.found


class _Features(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, watched: Iterable[Any]) -> None:
        super().__init__(module)
        self.watched = {n for n in watched if isinstance(n, fx.Node)}
        self.found: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.watched:
            largest = result.abs().reshape(-1, result.shape[-1]).amax(0)
            self.found[n] = torch.maximum(self.found[n], largest) if n in self.found else largest
        return result
