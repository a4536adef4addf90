"""Bit widths by measured sensitivity: which weights and activations get more bits where an average is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, fx

from gossamer.errors import UsageError
from gossamer.quantization.graph import channel_axis, tensor_at, value, weight_name
from gossamer.quantization.observers import Histogram, affine
from gossamer.quantization.points import Points
from gossamer.quantization.sensitivity import Sensitivity
from gossamer.quantization.steps import fake_quantize, mse_steps
from gossamer.search import knapsack, monotone

WIDTHS = (8, 6, 5, 4, 3, 2)
"""Bit widths that are chosen among, mildest first."""
HARMFUL = 1e-2
"""A divergence in nats above which one activation alone, at 8 bits, is given 16."""
Progress = Callable[[int, int], None]


def weight_losses(
    runs: Sensitivity, module: fx.GraphModule, points: Points, widths: Sequence[int] = WIDTHS, progress: Progress | None = None
) -> dict[str, list[float]]:
    """What rounding each weight alone does to the outputs, at each width: `Sensitivity.loss`, never falling towards fewer bits."""
    uses: dict[str, list[fx.Node]] = {}
    for layer in points.layers:
        uses.setdefault(str(weight_name(layer)), []).append(layer)
    found: dict[str, list[float]] = {}
    for i, (name, layers) in enumerate(uses.items()):
        w, axis, node = tensor_at(module, name).detach(), channel_axis(layers[0]), layers[0].args[1]
        assert isinstance(node, fx.Node)
        losses = []
        for bits in widths:
            rounded = fake_quantize(w, mse_steps(w, bits, axis, candidates=50), bits, axis)
            losses.append(runs.loss(node, partial(_replace, rounded)))
        found[name] = monotone(losses)
        if progress:
            progress(i + 1, len(uses))
    return found


def activation_losses(
    runs: Sensitivity, histograms: Mapping[fx.Node, Histogram], points: Points, observer: str, widths: Sequence[int] = WIDTHS
) -> dict[fx.Node, list[float]]:
    """What rounding each activation alone does to the outputs, at each width."""
    found = {}
    for node in points.activations:
        losses = []
        for bits in widths:
            step, zero = affine(*histograms[node].range(observer, bits), bits)
            top = (1 << bits) - 1
            losses.append(runs.loss(node, partial(_round, step, zero, top)))
        found[node] = monotone(losses)
    return found


def _replace(rounded: Tensor, _: Tensor) -> Tensor:
    return rounded


def _round(step: float, zero: int, top: int, x: Tensor) -> Tensor:
    return (x / step).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(step)


def allocate(
    losses: Mapping[Any, Sequence[float]], sizes: Mapping[Any, int], average: float, widths: Sequence[int] = WIDTHS
) -> dict[Any, int]:
    """Bit width of each tensor: the least total loss whose average over all entries is at most ``average``.

    Examples:
        >>> allocate({"a": [0, 1, 9], "b": [0, 5, 50]}, {"a": 100, "b": 100}, 6, widths=(8, 4, 2))
        {'a': 4, 'b': 8}

    Args:
        losses: of each tensor at each width.
        sizes: entries of each tensor.
        average: bits, within the widths.
        widths: what ``losses`` were measured at, mildest first.

    Raises:
        UsageError: an average that no allocation can meet.

    Source: a multiple-choice knapsack over layers measured one at a time.
    """
    check_average(average, widths)
    names = list(losses)
    largest = max((v for row in losses.values() for v in row if math.isfinite(v)), default=1.0)
    harms = [[v if math.isfinite(v) else 1e3 * largest + 1 for v in losses[n]] for n in names]
    total = sum(sizes[n] for n in names)
    picks = knapsack([[sizes[n] * b for b in widths] for n in names], harms, average * total, what="number of bits")
    return {n: widths[p] for n, p in zip(names, picks, strict=True)}


def check_average(average: float, widths: Sequence[int] = WIDTHS) -> None:
    """UsageError for an average that no allocation can meet."""
    if not isinstance(average, int | float) or not min(widths) <= average <= max(widths):
        raise UsageError(f"average_bits={average}: give a number from {min(widths)} to {max(widths)}")


def sizes_of(module: fx.GraphModule, points: Points) -> tuple[dict[str, int], dict[fx.Node, int]]:
    """Entries of each weight, and of each activation for one sample."""
    weights = {str(weight_name(n)): tensor_at(module, str(weight_name(n))).numel() for n in points.layers}
    activations = {}
    for node in points.activations:
        val = value(node)
        assert val is not None
        activations[node] = max(1, math.prod(int(d) for d in val.shape[1:]))
    return weights, activations
