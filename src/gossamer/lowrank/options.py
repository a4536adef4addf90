"""What each layer could become: methods and ranks with their costs, and what each would lose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from typing import Any

import numpy as np
from torch import nn

from gossamer.calibration import Divergence, Moments, in_stages, second_moments, shrunk
from gossamer.lowrank.fitting import Fitted, fit_layer
from gossamer.lowrank.layers import Site
from gossamer.lowrank.structure import Ranks, full_ranks, takes
from gossamer.plan import replace_module
from gossamer.profiling.chains import time_chains
from gossamer.search import monotone
from gossamer.sources.batches import Batch

FRACTIONS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Of a layer's MACs: ranks that are options under a budget, for each method."""
MEASURED = (0.75, 0.5, 0.25)
"""Of them, those whose loss is measured; between and beyond these it is interpolated."""
UNIT = 8
"""Ranks are multiples of this, the channels that one vector instruction handles, where a layer is wide enough."""
FASTER = 0.97
"""A factorised layer pays where it takes less than this fraction of the layer's time: less is noise."""
MOST_INPUTS = 6000
"""Layers with more inputs times kernel positions keep plain factors: their second moments would take gigabytes."""


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

    Example:
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


def fit_all(
    model: nn.Module,
    wanted: Mapping[str, Sequence[Option]],
    sites: Mapping[str, Site],
    batches: Iterable[Batch] | None,
    seed: int,
    use: Callable[[Site, Option, Fitted], None],
) -> None:
    """Fit every wanted option and hand it on, layer by layer, with the moments of a few layers at a time in memory.

    Args:
        model: the network as it is.
        wanted: options by layer.
        sites: layers by name.
        batches: for the moments; None for factors of the weights alone.
        seed: of CP.
        use: called with each fitted option.
    """
    layers = {name: sites[name].layer for name in wanted if sites[name].dims.ins * sites[name].dims.taps <= MOST_INPUTS}
    stages = in_stages(layers) if batches is not None and layers else [list(layers)]
    stages = [*stages, [n for n in wanted if n not in layers]]
    for stage in stages:
        moments: dict[str, Moments] = {}
        if batches is not None and stage and stage[0] in layers:
            moments = second_moments(model, {n: layers[n] for n in stage}, batches)
        for name in stage:
            known = moments.pop(name, None)
            c_GKK = shrunk(known).cpu() if known is not None else None
            for one in wanted[name]:
                use(sites[name], one, fit_layer(sites[name].layer, one.method, one.ranks, moments=known, c_GKK=c_GKK, seed=seed))


def losses(
    model: nn.Module,
    options: Mapping[str, Sequence[Option]],
    sites: Mapping[str, Site],
    batches: Iterable[Batch] | None,
    far: Divergence | None,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[tuple[str, Ranks], float]]:
    """What the network's outputs lose with each option alone: measured at a few ranks of each method, interpolated at the others.

    Args:
        model: the network; each layer is exchanged in it and put back.
        options: by layer.
        sites: layers by name.
        batches: calibration data for the factors; None for factors of the weights alone.
        far: what is measured; None takes the weights' relative squared error.
        seed: of CP.
        progress: called with measurements done and all.
    """
    chosen = {name: _measured(sites[name], found) for name, found in options.items() if found}
    total = sum(map(len, chosen.values()))
    raw: dict[str, dict[tuple[str, Ranks], float]] = {name: {} for name in chosen}
    done = 0

    def measure(site: Site, one: Option, fitted: Fitted) -> None:
        nonlocal done
        if far is None:
            loss = fitted.error**2
        else:
            changed = replace_module(model, site.layer, fitted.module)
            try:
                loss = far(changed)
            finally:
                replace_module(changed, fitted.module, site.layer)
        raw[site.name][one.method, one.ranks] = loss
        done += 1
        if progress is not None:
            progress(done, total)

    fit_all(model, chosen, sites, batches, seed, measure)
    return {name: _interpolated(sites[name], found, raw[name]) for name, found in options.items() if found}


def _measured(site: Site, options: Sequence[Option]) -> list[Option]:
    """Of each method's options those nearest to `MEASURED`."""
    out: list[Option] = []
    for method in dict.fromkeys(o.method for o in options):
        mine = [o for o in options if o.method == method]
        out += dict.fromkeys(min(mine, key=lambda o, f=f: abs(o.macs / site.macs - f)) for f in MEASURED)  # type: ignore[misc]
    return out


def _interpolated(site: Site, options: Sequence[Option], measured: Mapping[tuple[str, Ranks], float]) -> dict[tuple[str, Ranks], float]:
    """Losses of all options: their logarithm is linear in the MACs between two that were measured, and beyond them; never falling."""
    out: dict[tuple[str, Ranks], float] = {}
    for method in dict.fromkeys(o.method for o in options):
        mine = sorted((o for o in options if o.method == method), key=lambda o: -o.macs)
        known = sorted((o.macs / site.macs, measured[o.method, o.ranks]) for o in mine if (o.method, o.ranks) in measured)
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
