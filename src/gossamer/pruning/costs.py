"""What a network costs once some of its classes are gone, without building it: MACs, parameters or channels, linear in kept elements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gossamer.result import Profile
from gossamer.trace.channels import Axis, ChannelMap


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

    def kept(self, removed: Tensor) -> dict[int, Tensor]:
        """Per labelled dimension, what stays as float64 ones: shape ``(blocks, size)``, with dimension 0 divided into the blocks."""
        blocks = max((a.labels.shape[0] for a in self.axes if a.labels.dim() == 2), default=1)
        out = {}
        for a in self.axes:
            stays = ~(removed[a.labels.clamp(min=0)] & (a.labels >= 0))
            stays = stays.double()
            if a.dim == 0:
                out[0] = stays.reshape(blocks, -1)
            else:
                out[a.dim] = stays if stays.dim() == 2 else stays.expand(blocks, -1)
        return out

    def fixed(self) -> int:
        """Elements of the dimensions that carry no labels, dimension 0 excluded."""
        labelled = {a.dim for a in self.axes} | {0}
        return prod(n for d, n in enumerate(self.shape) if d not in labelled)

    def total(self, removed: Tensor) -> float:
        """Cost of what stays."""
        kept = self.kept(removed)
        return self.per_element * self.fixed() * float(self._per_block(kept).prod(0).sum())

    def _per_block(self, kept: Mapping[int, Tensor]) -> Tensor:
        """Kept count of dimension 0 and of every labelled dimension, per block: shape ``(dims, blocks)``."""
        blocks = next(iter(kept.values())).shape[0] if kept else 1
        rows = [k.sum(1) for k in kept.values()]
        if 0 not in kept:
            rows.insert(0, torch.full((blocks,), self.shape[0] / blocks, dtype=torch.float64))
        return torch.stack(rows)

    def add_marginal(self, removed: Tensor, out: Tensor) -> None:
        """Add to ``out[c]`` what removing class ``c`` next would save (to first order where a class appears in two dimensions)."""
        kept = self.kept(removed)
        counts = self._per_block(kept)
        order = list(kept) if 0 in kept else [0, *kept]
        for a in self.axes:
            others = [i for i, d in enumerate(order) if d != a.dim]
            each_B = counts[others].prod(0) * (self.per_element * self.fixed())
            saved = kept[a.dim] * each_B[:, None]
            labels = a.labels.reshape(saved.shape) if a.dim == 0 else a.labels.expand(saved.shape)
            flat = labels.reshape(-1)
            out.index_add_(0, flat[flat >= 0], saved.reshape(-1)[flat >= 0])


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

    def total(self, removed: Tensor) -> float:
        """Cost once the classes of the bool mask ``removed`` (shape ``(num_classes,)``) are gone."""
        return self.constant + sum(t.total(removed) for t in self.terms)

    def marginal(self, removed: Tensor) -> Tensor:
        """What removing each class next would save: float64, shape ``(num_classes,)``."""
        out = torch.zeros(self.num_classes, dtype=torch.float64)
        for t in self.terms:
            t.add_marginal(removed, out)
        return out


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


def channel_costs(channels: ChannelMap) -> CostModel:
    """Channels of the prunable families: each class counts its family's width."""
    terms = []
    for g in channels.groups:
        labels = g.classes.long().cpu()
        terms.append(Term((len(labels),), (Axis("", 0, labels, "out"),), float(g.width)))
    return CostModel(tuple(terms), 0.0, channels.num_classes, "channels")


def _axes_by_tensor(channels: ChannelMap) -> dict[str, tuple[Axis, ...]]:
    out: dict[str, tuple[Axis, ...]] = {}
    for a in channels.axes:
        out[a.tensor] = (*out.get(a.tensor, ()), a)
    return out
