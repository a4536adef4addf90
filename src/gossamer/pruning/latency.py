"""Latency as a target: what each layer would cost in ONNX Runtime, from a measured table, and what the whole pruned network does cost there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import UsageError
from gossamer.pruning.costs import Term, layer_terms
from gossamer.result import Profile
from gossamer.trace.channels import ChannelMap

STEP = 8
"""Channel counts that a latency target aims at are multiples of this, unless ``round_to`` says more: 17 can be slower than 24."""


@dataclass(frozen=True)
class _Layer:
    """One layer: its weight's labels, and milliseconds as a function of its channels."""

    term: Term
    table: Callable[[float, float], float]
    groups: int
    depthwise: bool

    def sizes(self, removed: Tensor) -> tuple[float, float]:
        """Input and output channels left."""
        gone = removed.numpy()
        left = [[size - int(gone[labels[labels >= 0]].sum()) for size, labels in block] for block in self.term.rows()]
        outs = float(sum(block[0] for block in left))
        if self.depthwise:
            return outs, outs
        ins = float(left[0][1] if len(left[0]) > 1 else self.term.shape[1])
        groups = sum(block[0] > 0 for block in left) if len(left) > 1 else self.groups
        return ins * groups, outs

    def ms(self, removed: Tensor) -> float:
        return self.table(*self.sizes(removed))


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of a network as a function of the removed classes; used as a `gossamer.pruning.costs.CostModel` is.

    Attributes:
        layers: measured layers that can shrink.
        constant: milliseconds of everything else.
        num_classes: of the channel map.
        unit: what is counted.
    """

    layers: tuple[_Layer, ...]
    constant: float
    num_classes: int
    unit: str = "latency"

    def total(self, removed: Tensor) -> float:
        """Milliseconds once the classes of the bool mask ``removed`` are gone."""
        return self.constant + sum(layer.ms(removed) for layer in self.layers)

    def marginal(self, removed: Tensor) -> Tensor:
        """Milliseconds that removing each class next would save, averaged over the next `STEP` channels."""
        out = torch.zeros(self.num_classes, dtype=torch.float64)
        for layer in self.layers:
            ins, outs = layer.sizes(removed)
            now = layer.table(ins, outs)
            per_in = (now - layer.table(max(ins - STEP, 1), outs)) / STEP
            per_out = (now - layer.table(ins, max(outs - STEP, 1))) / STEP
            for block in layer.term.rows():
                for (_, labels), price in zip(block, (per_out, per_in), strict=False):
                    inside = torch.from_numpy(labels[labels >= 0])
                    out.index_add_(0, inside, torch.full((len(inside),), price, dtype=torch.float64))
        return out * ~removed


def latency_costs(
    model: nn.Module, channels: ChannelMap, profile: Profile, *, threads: int = 1, progress: Callable[[int, int], None] | None = None
) -> LatencyModel:
    """Measure every layer that can shrink at several widths.

    Args:
        model: the network.
        channels: its channel map.
        profile: its profile.
        threads: of the runtime.
        progress: called with measurements done and all.
    """
    from gossamer.profiling.layers import layer_shapes, measure_layers

    shapes = layer_shapes(model, profile)
    tables = measure_layers(list(shapes.values()), threads=threads, progress=progress)
    state = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    terms = layer_terms(channels, profile, state)
    layers, constant = [], 0.0
    for i, key in shapes.items():
        if i in terms:
            layers.append(_Layer(terms[i], tables[key], key[0].groups, key[0].op == "depthwise"))
        else:
            constant += tables[key](key[1], key[2])
    return LatencyModel(tuple(layers), constant, channels.num_classes)


def fraction(target: float | str, model: nn.Module, example_inputs: Any, *, threads: int = 1) -> float:
    """A latency target as a fraction of the original's: ``0.5``, or ``"5ms"`` against what the original takes in ONNX Runtime."""
    if isinstance(target, int | float):
        return float(target)
    found = re.fullmatch(r"\s*([0-9.]+)\s*ms\s*", target)
    if not found:
        raise UsageError(f"latency={target!r}: give a fraction of the original's, such as 0.5, or milliseconds, such as '5ms'")
    return float(found[1]) / _times([model], example_inputs, threads)[0].median_ms


def measured(original: nn.Module, pruned: nn.Module, example_inputs: Any, *, threads: int = 1) -> tuple[float, str]:
    """Latency of the pruned network as a fraction of the original's, interleaved in ONNX Runtime, and a line that says so."""
    before, after = _times([original, pruned], example_inputs, threads)
    return after.ratio, (
        f"latency {after.median_ms:.2f} ms against {before.median_ms:.2f} ms: {after.ratio:.2f} of the original "
        f"({after.ratio_p10:.2f} to {after.ratio_p90:.2f}), ONNX Runtime, {threads} thread{'s' if threads > 1 else ''}"
    )


def _times(networks: Sequence[nn.Module], example_inputs: Any, threads: int) -> Sequence[Any]:
    from gossamer.profiling import benchmark

    return benchmark(*networks, example_inputs=example_inputs, threads=threads).rows
