"""Ranks without a budget: as given, by energy, or by variational Bayes; for each layer the first method that pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

from gossamer.calibration import MOST_INPUTS, Batches, Moments, in_stages, second_moments, shrunk
from gossamer.errors import SelectorError, UsageError, near
from gossamer.exchange import canonical
from gossamer.lowrank.decompositions import spectra, unfolded
from gossamer.lowrank.evbmf import evbmf_rank
from gossamer.lowrank.layers import Site
from gossamer.lowrank.options import UNIT, Option, option, timed
from gossamer.lowrank.structure import Ranks, full_ranks, takes

RankSpec = int | float | Literal["evbmf"] | tuple[int | float, ...]


def chosen_ranks(
    model: nn.Module,
    sites: Mapping[str, Site],
    methods: Sequence[str],
    auto: bool,
    rank: RankSpec | Mapping[str, RankSpec] | None,
    energy: float | None,
    batches: Batches | None,
    *,
    round_to: int | None,
    threads: int | None,
) -> tuple[dict[str, Option], list[str]]:
    """A method and ranks for each layer that pays.

    Args:
        model: the network.
        sites: its layers by name.
        methods: to choose from. Where ranks are found, the fastest is taken, or, if nothing is timed, the one with the fewest multiply-adds;
            at given ranks the first that saves work: in the order given, or, by ``auto``, spatial SVD, Tucker-2, SVD.
        auto: only where a layer gets faster.
        rank, energy: as `factorize` takes them; one of the two.
        batches: for energies of the outputs.
        round_to: ranks found are multiples of it; None for 8 where that is not slower.
        threads: of ONNX Runtime; None times nothing.

    Returns:
        Options by layer, and notes on what was left alone.
    """
    specs = _by_layer(sites, rank)
    found: dict[str, list[Option]] = {}
    if energy is not None or any(s == "evbmf" for s in specs.values()):
        found = _analytic(model, sites, specs, methods, energy, batches, round_to, threads)
    picks: dict[str, Option] = {}
    useless, slower = list[str](), list[str]()
    for name, site in sites.items():
        spec = specs.get(name)
        if rank is not None and spec is None:
            continue
        options = found.get(name, []) if spec == "evbmf" or energy is not None else _given(site, methods, spec, auto)
        saving = [o for o in options if o.macs < site.macs and o.params < site.params]
        if not saving:
            useless.append(name)
            continue
        by_cost = energy is not None or spec == "evbmf"
        if threads is not None and (auto or (by_cost and len(saving) > 1)):
            saving = timed(site, saving, threads=threads)
        if auto and not any(o.pays for o in saving):
            slower.append(name)
            continue
        saving = [o for o in saving if o.pays] if auto else saving
        picks[name] = min(saving, key=lambda o: o.ms if o.ms is not None else o.macs) if by_cost else saving[0]
    notes = []
    if useless:
        notes.append(f"left alone, these ranks save nothing there: {_some(useless)}")
    if slower:
        notes.append(f"left alone, not faster in ONNX Runtime: {_some(slower)}")
    return picks, notes


def _by_layer(sites: Mapping[str, Site], rank: RankSpec | Mapping[str, RankSpec] | None) -> dict[str, Any]:
    if rank is None:
        return {}
    table = rank if isinstance(rank, Mapping) else {"*": rank}
    out: dict[str, Any] = {}
    for pattern, spec in table.items():
        parts = spec if isinstance(spec, tuple | list) else (spec,)
        fits = [(isinstance(r, int) and not isinstance(r, bool) and r >= 1) or (isinstance(r, float) and 0 < r < 1) for r in parts]
        if spec != "evbmf" and (not parts or not all(fits)):
            raise UsageError(f"rank={spec!r}: give integers of 1 or more, fractions in (0, 1), or 'evbmf'")
        hit = [n for n in sites if fnmatchcase(n, pattern)]
        if not hit:
            raise SelectorError(f"rank: {pattern!r} matches no layer that can be factorised{near(pattern, sites)}")
        out |= dict.fromkeys(hit, spec if spec == "evbmf" else tuple(parts))
    return out


def _given(site: Site, methods: Sequence[str], spec: Any, auto: bool) -> list[Option]:
    """Options at given ranks, the preferred method first."""
    order = sorted(methods, key=["spatial_svd", "tucker2", "svd"].index) if auto else methods
    out = []
    for method in order:
        if not takes(method, site.dims):
            continue
        full = full_ranks(method, site.dims)
        wide = spec * len(full) if len(spec) == 1 else spec
        if len(wide) != len(full):
            if not auto and len(methods) == 1:
                raise UsageError(f"rank={spec}: {method} takes {len(full)} for {site.name or 'the network'}")
            continue
        ranks = tuple(max(1, min(f, round(r * f) if isinstance(r, float) else r)) for r, f in zip(wide, full, strict=True))
        out.append(option(site, method, ranks))
    return out


def _analytic(
    model: nn.Module,
    sites: Mapping[str, Site],
    specs: Mapping[str, Any],
    methods: Sequence[str],
    energy: float | None,
    batches: Batches | None,
    round_to: int | None,
    threads: int | None,
) -> dict[str, list[Option]]:
    """Options at ranks that the weights, or with energy and data the outputs, ask for."""
    if "cp" in methods:
        raise UsageError("method 'cp' has no singular values: give its rank, or a budget")
    wanted = {n: s for n, s in sites.items() if energy is not None or specs.get(n) == "evbmf"}
    out: dict[str, list[Option]] = {}

    def find(name: str, moments: Moments | None) -> None:
        site = wanted[name]
        w = canonical(site.layer).cpu().double()
        c_GKK = shrunk(moments).cpu() if moments is not None else None
        out[name] = []
        for method in methods:
            if not takes(method, site.dims):
                continue
            if energy is not None:
                ranks = tuple(_enough(values, energy) for values in spectra(method, w, c_GKK))
            else:
                ranks = tuple(max(evbmf_rank(m) for m in matrices) for matrices in unfolded(method, w))
            if min(ranks) > 0:  # else there is nothing but noise
                out[name].append(_rounded(site, method, ranks, round_to, threads))

    layers = {n: s.layer for n, s in wanted.items() if s.dims.ins * s.dims.taps <= MOST_INPUTS}
    if batches is None or energy is None or not layers:
        for name in wanted:
            find(name, None)
        return out
    for stage in in_stages(layers):
        moments = second_moments(model, {n: layers[n] for n in stage}, batches)
        for name in stage:
            find(name, moments.pop(name, None))
    for name in wanted:
        if name not in layers:
            find(name, None)
    return out


def _enough(values_GR: Tensor, energy: float) -> int:
    """The smallest rank whose energies, over all groups, come to a fraction of all."""
    kept = values_GR.sum(0).cumsum(0)
    if float(kept[-1]) <= 0:
        return 1
    return min(int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1, len(kept))


def _rounded(site: Site, method: str, ranks: Ranks, round_to: int | None, threads: int | None) -> Option:
    """Ranks up to multiples, where, for a multiple that was not asked for, that is not slower."""
    full = full_ranks(method, site.dims)
    unit = round_to or UNIT
    up = tuple(min(f, -(-r // unit) * unit) for r, f in zip(ranks, full, strict=True))
    exact, rounded = option(site, method, tuple(ranks)), option(site, method, up)
    if round_to is not None:
        return rounded
    if threads is None or up == ranks:
        return exact
    exact, rounded = timed(site, [exact, rounded], threads=threads)
    assert exact.ms is not None
    assert rounded.ms is not None
    return rounded if rounded.ms <= exact.ms and rounded.macs < site.macs else exact


def _some(names: Sequence[str]) -> str:
    return ", ".join(n or "the network itself" for n in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
