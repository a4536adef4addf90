"""What each layer could become: methods and ranks with their costs, and what each would lose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import exp, log
from typing import Any

import numpy as np
from torch import nn

from gossamer.calibration import Divergence, Fits, Halves, alone, shrunk
from gossamer.lowrank.fitting import Fitted, fit_layer
from gossamer.lowrank.layers import Site
from gossamer.lowrank.structure import Ranks, full_ranks, takes
from gossamer.profiling.chains import time_chains
from gossamer.search import monotone

FRACTIONS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Of a layer's MACs: ranks that are options under a budget, for each method."""
MEASURED = (0.75, 0.5, 0.25)
"""Of them, those whose loss is measured; between and beyond these it is interpolated."""
UNIT = 8
"""Ranks are multiples of this, the channels that one vector instruction handles, where a layer is wide enough."""
FASTER = 0.97
"""A factorised layer pays where it takes less than this fraction of the layer's time: less is noise."""


@dataclass(frozen=True)
class Option:
    """One way to factorise a layer.

    Attributes:
        method, ranks: of the factors.
        macs, params: of the factorised layer.
        ms, before_ms: milliseconds in ONNX Runtime, of the factors and of the layer itself; None where they were not measured.
    """

    method: str
    ranks: Ranks
    macs: int
    params: int
    ms: float | None = None
    before_ms: float | None = None

    @property
    def pays(self) -> bool:
        """Whether it is faster than the layer, as far as that is known."""
        return self.ms is None or self.before_ms is None or self.ms < FASTER * self.before_ms


def option(site: Site, method: str, ranks: Ranks) -> Option:
    """An option with its costs."""
    macs, params = site.cost(method, ranks)
    return Option(method, ranks, macs, params)


def ladder(site: Site, methods: Sequence[str], *, unit: int | None = None) -> list[Option]:
    """For each method that a layer takes, the largest ranks at each of `FRACTIONS` of the layer's MACs, descending.

    Args:
        site: the layer.
        methods: to consider.
        unit: ranks are multiples of it; None for 8, or less where the layer is narrow.
    """
    out = []
    for method in methods:
        if not takes(method, site.dims):
            continue
        full = full_ranks(method, site.dims)
        seen: list[Ranks] = []
        for fraction in FRACTIONS:
            ranks = largest(site, method, full, fraction * site.macs, unit)
            if ranks is not None and ranks not in seen:
                seen.append(ranks)
        out += [option(site, method, ranks) for ranks in seen]
    return [o for o in out if o.macs < site.macs]


def largest(site: Site, method: str, full: Ranks, macs: float, unit: int | None) -> Ranks | None:
    """The largest ranks, all at the same fraction of the full ones, whose MACs stay within a limit; None where not even the least do."""
    low, high = 0, max(full)
    while low < high:
        middle = (low + high + 1) // 2
        if site.cost(method, at(full, middle / max(full), unit))[0] <= macs:
            low = middle
        else:
            high = middle - 1
    return at(full, low / max(full), unit) if low else None


def at(full: Ranks, fraction: float, unit: int | None) -> Ranks:
    """Ranks at a fraction of the full ones, rounded down to multiples; at least one multiple.

    Examples:
        >>> at((64, 100), 0.5, None), at((16,), 0.4, None), at((64,), 0.5, 5)
        ((32, 48), (6,), (30,))
    """
    out = []
    for f in full:
        step = unit if unit is not None else UNIT if f >= 4 * UNIT else max(1, min(f // 8, UNIT))
        out.append(min(f, max(step, int(f * fraction + 1e-9) // step * step)))
    return tuple(out)


def timed(site: Site, options: Sequence[Option], *, threads: int) -> list[Option]:
    """The options with milliseconds in ONNX Runtime, beside the layer itself, summed over its calls."""
    chains = [site.chain(), *(site.chain(o.method, o.ranks) for o in options)]
    total = np.zeros(len(chains))
    for shape, calls in Counter(site.shapes).items():
        total += calls * np.array(time_chains(chains, shape, threads=threads))
    return [replace(o, ms=float(t), before_ms=float(total[0])) for o, t in zip(options, total[1:], strict=True)]


def smoothed(options: Sequence[Option]) -> list[Option]:
    """Options with no method slower at lower ranks than at higher ones: where it measured so, that is noise, or the higher ones serve as well.

    Args:
        options: timed; those of a method by falling ranks.
    """
    least: dict[str, float] = {}
    out = []
    for one in options:
        if one.ms is not None:
            least[one.method] = min(one.ms, least.get(one.method, one.ms))
        out.append(replace(one, ms=least.get(one.method)))
    return out


def fit_all(
    halves: Halves, wanted: Mapping[str, Sequence[Option]], sites: Mapping[str, Site], seed: int, *, apart: bool = False
) -> Fits[Option, Fitted]:
    """Fit every wanted option, layer by layer.

    Args:
        halves: of the layers' inputs.
        wanted: options by layer.
        sites: layers by name.
        seed: of CP.
        apart: where moments are few, fitted twice, to be judged on even batches and on odd ones (see `gossamer.calibration.Halves`).
    """
    for name, moments in halves.of(wanted, apart=apart):
        spread = [shrunk(m).cpu() if m is not None else None for m in moments]
        for one in wanted[name]:
            layer = sites[name].layer
            made = [fit_layer(layer, one.method, one.ranks, moments=m, c_GKK=c, seed=seed) for m, c in zip(moments, spread, strict=True)]
            yield name, one, (made[0], made[-1])


def losses(
    model: nn.Module,
    options: Mapping[str, Sequence[Option]],
    sites: Mapping[str, Site],
    halves: Halves,
    far: Divergence | None,
    *,
    macs: float,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[tuple[str, Ranks], float]]:
    """What the network's outputs lose with each option alone: judged at a few ranks of each method, interpolated at the others.

    Args:
        model: the network, which stays as it is.
        options: by layer.
        sites: layers by name.
        halves: of the layers' inputs.
        far: what is judged by; None takes the weights' relative squared error.
        macs: of the network, for each sample.
        seed: of CP, and of the prediction.
        progress: called with steps done and all: each option is fitted, then judged.
    """
    chosen = {name: _measured(sites[name], found) for name, found in options.items() if found}
    done, total = count(1), 2 * sum(map(len, chosen.values()))

    def step() -> None:
        if progress is not None:
            progress(next(done), total)

    layers = {n: sites[n].layer for n in chosen}
    raw = alone(model, layers, fit_all(halves, chosen, sites, seed, apart=far is not None), far, macs=macs, seed=seed, step=step)
    return {name: _interpolated(sites[name], found, raw[name]) for name, found in options.items() if found}


def _measured(site: Site, options: Sequence[Option]) -> list[Option]:
    """Of each method's options those nearest to `MEASURED`."""
    out: list[Option] = []
    for method in dict.fromkeys(o.method for o in options):
        mine = [o for o in options if o.method == method]
        out += dict.fromkeys(min(mine, key=lambda o, f=f: abs(o.macs / site.macs - f)) for f in MEASURED)  # type: ignore[misc]
    return out


def _interpolated(site: Site, options: Sequence[Option], measured: Mapping[Option, float]) -> dict[tuple[str, Ranks], float]:
    """Losses of all options: their logarithm is linear in the MACs between two that were measured, and beyond them; never falling."""
    out: dict[tuple[str, Ranks], float] = {}
    for method in dict.fromkeys(o.method for o in options):
        mine = sorted((o for o in options if o.method == method), key=lambda o: -o.macs)
        known = sorted((o.macs / site.macs, measured[o]) for o in mine if o in measured)
        x = np.array([k[0] for k in known])
        y = np.array([log(min(max(k[1], 1e-9), 1e9)) for k in known])
        values = [exp(_line(x, y, o.macs / site.macs)) for o in mine]
        out |= {(o.method, o.ranks): v for o, v in zip(mine, monotone(values), strict=True)}
    return out


def _line(x: Any, y: Any, point: float) -> float:
    """Piecewise linear through ascending points, its ends continued; where ends would rise with the cost, they stay level."""
    if len(x) == 1 or x[0] <= point <= x[-1]:
        return float(np.interp(point, x, y))
    a, b = (0, 1) if point < x[0] else (-2, -1)
    slope = min((y[b] - y[a]) / (x[b] - x[a]), 0.0)
    return float(min((y[0] if point < x[0] else y[-1]) + slope * (point - (x[0] if point < x[0] else x[-1])), 20.0))
