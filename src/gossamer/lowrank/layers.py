"""Which layers of a network can be factorised, and what their factors cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import nn

from gossamer.exchange import Place, bare, find_places
from gossamer.lowrank.structure import Ranks, factors_of, positions, skeleton
from gossamer.profiling.chains import Chain, chain


@dataclass(frozen=True)
class Site(Place):
    """A layer that can be factorised.

    Attributes:
        gains_bias: whether its last factor gets a bias that the layer does not have.
    """

    gains_bias: bool = False
    _uses: dict[str, list[int]] = field(default_factory=dict, compare=False, repr=False)

    def cost(self, method: str, ranks: Ranks) -> tuple[int, int]:
        """MACs of all calls and parameters of the factorised layer."""
        if method not in self._uses:
            each = [positions(self.layer, method, shape) for shape in self.shapes]
            self._uses[method] = [sum(column) for column in zip(*each, strict=True)]
        sizes = [prod(f.shape) for f in factors_of(method, self.dims, ranks)]
        macs = sum(n * uses for n, uses in zip(sizes, self._uses[method], strict=True))
        d = self.dims
        bias = self.params - d.groups * d.outs * d.ins * d.taps + (d.groups * d.outs if self.gains_bias else 0)
        return macs, sum(sizes) + bias

    def chain(self, method: str | None = None, ranks: Ranks = ()) -> Chain:
        """The layer, or its factors, as nodes of the runtime."""
        if method is None:
            return chain([bare(self.layer)])
        return chain(skeleton(self.layer, method, ranks, bias=True, device="meta"))


def find_sites(model: nn.Module, example_inputs: Any, ignore: Sequence[str] = ()) -> tuple[list[Site], list[str]]:
    """Layers that factors can stand in for, and one line for each reason why others are left alone (see `gossamer.exchange.find_places`)."""
    places, notes = find_places(model, example_inputs, ignore)
    return [Site(p.name, p.layer, p.shapes, p.dims, p.macs, p.params) for p in places], notes
