"""What a network costs once some of its classes are gone, without building it: MACs, parameters or channels, linear in kept elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from gossamer.result import Profile
from gossamer.trace.channels import Axis, ChannelMap

Array = np.ndarray


@dataclass(frozen=True)
class Term:
    """One tensor whose kept elements each cost ``per_element``.

    Attributes:
        shape: of the tensor.
        axes: its labelled dimensions, at most one per dimension.
        per_element: cost of one element: positions it is used at (MACs), or 1 (parameters).
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    per_element: float

    @property
    def blocks(self) -> int:
        """Equal parts of dimension 0 that lose channels independently (the groups of a convolution)."""
        return max((a.labels.shape[0] for a in self.axes if a.labels.dim() == 2), default=1)

    @property
    def labelled(self) -> list[int]:
        """Dimension 0 and every other one with labels, ascending."""
        return sorted({0, *(a.dim for a in self.axes)})

    def rows(self) -> list[list[tuple[int, Array]]]:
        """For each block, for dimension 0 and every labelled dimension: its size, and the labels along it."""
        by_dim = {a.dim: a.labels.numpy() for a in self.axes}
        none = np.zeros(0, dtype=np.int64)
        out = []
        for b in range(self.blocks):
            block = []
            for d in self.labelled:
                labels = by_dim.get(d)
                if d == 0:
                    size = self.shape[0] // self.blocks
                    block.append((size, none if labels is None else labels.reshape(self.blocks, -1)[b]))
                elif labels is not None:
                    mine = labels[b] if labels.ndim == 2 else labels
                    block.append((len(mine), mine))
            out.append(block)
        return out

    def fixed(self) -> int:
        """Elements of the dimensions that carry no labels, dimension 0 excluded."""
        return prod(n for d, n in enumerate(self.shape) if d not in self.labelled)


@dataclass(frozen=True)
class Table:
    """All terms as one table: a row for each labelled dimension of each block of each term.

    Attributes:
        sizes: of the rows before anything goes.
        labels: csr of shape ``(rows, classes)``: how often each class occurs in a row.
        starts: first row of each block.
        weights: cost of one element of each block.
    """

    sizes: Array
    labels: csr_array
    starts: Array
    weights: Array

    @classmethod
    def of(cls, terms: Sequence[Term], num_classes: int) -> Table:
        """The table of some terms."""
        sizes, starts, weights = list[int](), list[int](), list[float]()
        rows, columns = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for term in terms:
            weight = term.per_element * term.fixed()
            for block in term.rows():
                starts.append(len(sizes))
                weights.append(weight)
                for size, labels in block:
                    found = labels[labels >= 0]
                    rows.append(np.full(len(found), len(sizes)))
                    columns.append(found)
                    sizes.append(size)
        row, column = np.concatenate(rows), np.concatenate(columns)
        counts = csr_array((np.ones(len(row)), (row, column)), shape=(len(sizes), num_classes))
        return cls(np.array(sizes, dtype=float), counts, np.array(starts, dtype=np.int64), np.array(weights))

    def left(self, removed: Array) -> tuple[Array, Array]:
        """Size of every row, and cost of every block, once classes are gone."""
        sizes = self.sizes - self.labels @ removed.astype(float)
        return sizes, self.weights * np.multiply.reduceat(sizes, self.starts) if len(self.starts) else self.weights


@dataclass(frozen=True)
class CostModel:
    """Cost of a network as a function of the removed classes.

    Attributes:
        terms: the tensors that can shrink.
        constant: cost of everything else.
        num_classes: of the channel map.
        unit: what is counted, ``"MACs"``, ``"parameters"`` or ``"channels"``.
    """

    terms: tuple[Term, ...]
    constant: float
    num_classes: int
    unit: str

    @cached_property
    def _table(self) -> Table:
        return Table.of(self.terms, self.num_classes)

    def total(self, removed: Tensor) -> float:
        """Cost once the classes of the bool mask ``removed`` (shape ``(num_classes,)``) are gone."""
        return self.constant + float(self._table.left(removed.numpy())[1].sum())

    def marginal(self, removed: Tensor) -> Tensor:
        """What removing each class next would save (to first order where it appears in two dimensions): float64, ``(num_classes,)``."""
        table = self._table
        sizes, costs = table.left(removed.numpy())
        each = np.repeat(costs, np.diff([*table.starts, len(sizes)])) / np.maximum(sizes, 1)
        return torch.from_numpy((table.labels.T @ each) * ~removed.numpy())


def layer_terms(channels: ChannelMap, profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, Term]:
    """The weight of each layer that can shrink, by its place in ``profile.layers``."""
    by_tensor = _axes_by_tensor(channels)
    found = {}
    for i, layer in enumerate(profile.layers):
        if layer.weight in by_tensor:
            found[i] = Term(tuple(shapes[str(layer.weight)]), by_tensor[str(layer.weight)], 1.0)
    return found


def mac_costs(channels: ChannelMap, profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> CostModel:
    """MACs of every weight that carries labels; contractions without a weight count as constant.

    Args:
        channels: of the network.
        profile: of the network.
        shapes: state-dict name -> shape.
    """
    by_tensor = _axes_by_tensor(channels)
    macs: dict[str, float] = {}
    constant = 0.0
    for layer in profile.layers:
        if layer.weight in by_tensor:
            macs[str(layer.weight)] = macs.get(str(layer.weight), 0.0) + layer.macs
        else:
            constant += layer.macs
    constant += profile.macs - sum(layer.macs for layer in profile.layers)
    terms = tuple(Term(tuple(shapes[w]), by_tensor[w], m / prod(shapes[w])) for w, m in macs.items())
    return CostModel(terms, constant, channels.num_classes, "MACs")


def parameter_costs(channels: ChannelMap, profile: Profile, parameters: Mapping[str, tuple[int, ...]]) -> CostModel:
    """Elements of every parameter (name -> shape in ``parameters``; buffers left out, tied parameters once)."""
    by_tensor = _axes_by_tensor(channels)
    terms = tuple(Term(tuple(s), by_tensor[n], 1.0) for n, s in parameters.items() if n in by_tensor)
    return CostModel(terms, profile.params - sum(prod(t.shape) for t in terms), channels.num_classes, "parameters")


def channel_costs(channels: ChannelMap, kept: Tensor | None = None) -> CostModel:
    """Channels of the prunable families: each class counts its family's width.

    Args:
        channels: of the network.
        kept: bool, shape ``(num_classes,)``: classes that must stay and do not count.
    """
    terms = []
    for g in channels.groups:
        labels = g.classes.long().cpu()
        if kept is not None:
            labels = labels[~kept[labels]]
        if not len(labels):
            continue
        terms.append(Term((len(labels),), (Axis("", 0, labels, "out"),), float(g.width)))
    return CostModel(tuple(terms), 0.0, channels.num_classes, "channels")


def _axes_by_tensor(channels: ChannelMap) -> dict[str, tuple[Axis, ...]]:
    out: dict[str, tuple[Axis, ...]] = {}
    for a in channels.axes:
        out[a.tensor] = (*out.get(a.tensor, ()), a)
    return out
