"""Latency as a target: what each layer would cost in ONNX Runtime, from a measured table, and what the whole pruned network does cost there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.pruning.costs import Table, Term, layer_terms
from gossamer.result import Profile
from gossamer.trace.channels import ChannelMap

STEP = 8
"""Channel counts that a latency target aims at are multiples of this, unless ``round_to`` says more: 17 can be slower than 24."""


@dataclass(frozen=True)
class _Layer:
    """One layer: its weight's labels, and milliseconds as a function of its channels."""

    term: Term
    ms: Callable[[float, float], float]
    groups: int
    depthwise: bool

    def widths(self, sizes: np.ndarray) -> tuple[float, float]:
        """Input and output channels left, from the sizes left of each block, shape ``(blocks, dims)``."""
        outs = float(sizes[:, 0].sum())
        if self.depthwise:
            return outs, outs
        labelled = self.term.labelled
        ins = float(sizes[0, labelled.index(1)] if 1 in labelled else self.term.shape[1])
        return ins * (int((sizes[:, 0] > 0).sum()) if len(sizes) > 1 else self.groups), outs


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

    @cached_property
    def _table(self) -> Table:
        return Table.of([layer.term for layer in self.layers], self.num_classes)

    def _widths(self, removed: Tensor) -> Iterator[tuple[_Layer, slice, tuple[float, float]]]:
        """Every layer with its rows of the table and the channels left."""
        sizes, _ = self._table.left(removed.numpy())
        at = 0
        for layer in self.layers:
            blocks = layer.term.blocks
            dims = len(layer.term.labelled)
            rows = slice(at, at + blocks * dims)
            yield layer, rows, layer.widths(sizes[rows].reshape(blocks, dims))
            at = rows.stop

    def total(self, removed: Tensor) -> float:
        """Milliseconds once the classes of the bool mask ``removed`` are gone."""
        return self.constant + sum(layer.ms(ins, outs) for layer, _, (ins, outs) in self._widths(removed))

    def marginal(self, removed: Tensor) -> Tensor:
        """Milliseconds that removing each class next would save, averaged over the next `STEP` channels."""
        prices = np.zeros(len(self._table.sizes))
        for layer, rows, (ins, outs) in self._widths(removed):
            now = layer.ms(ins, outs)
            saved = {0: now - layer.ms(ins, max(outs - STEP, 1)), 1: now - layer.ms(max(ins - STEP, 1), outs)}
            prices[rows] = np.tile([saved.get(d, 0.0) / STEP for d in layer.term.labelled], layer.term.blocks)
        return torch.from_numpy((self._table.labels.T @ prices) * ~removed.numpy())


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
