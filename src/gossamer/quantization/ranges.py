"""Ranges of activations by the network's outputs, taken where samples that did not choose them bear them out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gossamer.plan import QuantizeActivation
from gossamer.quantization.calibration import leading, parts, sample
from gossamer.quantization.edits import activation_edit
from gossamer.quantization.influence import influences
from gossamer.quantization.observers import Histogram
from gossamer.quantization.ops import limits
from gossamer.quantization.points import Points

_SAMPLES = 64  # that derivatives are taken of
_TRIED_ON = 24


def ranges_by_outputs(module: fx.GraphModule, points: Points, histograms: Mapping[fx.Node, Histogram], leaves: list[Any], bits: int) -> str:
    """Let histograms choose ranges by the outputs, in place, where that lowers the outputs' noise on other samples.

    Derivatives see a value that goes through a step, or far out of its own range, wrongly. So ranges that every other sample gives are tried on the
    others, weights in float, against those of least squared error.

    Args:
        module: a canonical graph.
        points: what will be rounded.
        histograms: of the points; their ``least_noise`` is set.
        leaves: flat inputs, several samples.
        bits: of the activations.

    Returns:
        A note.
    """
    found = influences(module, histograms, leading(module, leaves, _SAMPLES))
    if not found:
        return "ranges of activations have the least squared error: what the outputs depend on cannot be derived"
    for node, influence in found.items():
        histograms[node].least_noise = partial(influence.least, kept=slice(0, None, 2))
    edits = {o: {n: activation_edit(p, histograms[n], o, bits) for n, p in points.activations.items()} for o in ("mse", "output")}
    changed = sum(edits["mse"][n] != edits["output"][n] for n in found)
    other = sample(module, leaves, 1, _TRIED_ON)
    noise = output_noise(module, edits, other) if changed else {"mse": 0.0, "output": 0.0}
    for node, influence in found.items():
        histograms[node].least_noise = influence.least if noise["output"] < noise["mse"] else None
    tried = f"noise on other samples {noise['output']:.3g}, with the least squared error {noise['mse']:.3g}"
    return f"ranges of {changed if noise['output'] < noise['mse'] else 0} of {len(edits['mse'])} activations by the outputs" + (
        f": {tried}" if changed else ""
    )


def output_noise(
    module: fx.GraphModule, choices: Mapping[str, Mapping[fx.Node, QuantizeActivation]], leaves: list[Any]
) -> dict[str, float]:
    """Squared error of the outputs over their mean square where activations alone are rounded, with each choice; summed over outputs."""
    sums: dict[str, dict[int, list[float]]] = {choice: {} for choice in choices}
    with torch.no_grad():
        for part in parts(module, leaves):
            wanted = pytree.tree_leaves(fx.Interpreter(module).run(*part, enable_io_processing=False))
            for choice, edits in choices.items():
                got = pytree.tree_leaves(_Rounding(module, edits).run(*part, enable_io_processing=False))
                for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
                    if isinstance(a, Tensor) and a.is_floating_point():
                        error, power = sums[choice].setdefault(i, [0.0, 0.0])
                        sums[choice][i] = [error + float((a - b).square().sum()), power + float(a.square().sum())]
    return {choice: sum(error / max(power, 1e-30) for error, power in found.values()) for choice, found in sums.items()}


class _Rounding(fx.Interpreter):
    """Runs a float graph with some values rounded."""

    def __init__(self, module: fx.GraphModule, edits: Mapping[fx.Node, QuantizeActivation]) -> None:
        super().__init__(module)
        self.edits = edits

    def run_node(self, n: fx.Node) -> Any:
        result, edit = super().run_node(n), self.edits.get(n)
        if edit is None:
            return result
        low, high = limits(edit.bits, edit.signed)
        return (result / edit.step).round_().add_(edit.zero_point).clamp_(low, high).sub_(edit.zero_point).mul_(edit.step)
