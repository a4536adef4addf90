"""Convolutions fitted one by one, sizes allocated to a budget of MACs, and which of them got slower."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from gossamer.calibration import Batches, Divergence, Moments, in_stages, second_moments
from gossamer.decoupling.fitting import Fitted, fit_layer
from gossamer.decoupling.forms import Sizes, cost
from gossamer.errors import BudgetError
from gossamer.exchange import Layer, Place, bare
from gossamer.plan import replace_module
from gossamer.profiling.chains import chain, time_chains
from gossamer.result import Profile
from gossamer.search import knapsack, monotone

MOST_INPUTS = 6000
"""Layers with more inputs times kernel positions are fitted without data: their second moments would take gigabytes."""
MOST_LOSS = 1e9
POWERS = (1.0, 0.5, 2.0)
"""Of the losses: sums of single losses predict joint ones only roughly, so allocations by each power are compared by the whole network's."""


def each_fitted(
    model: nn.Module,
    places: Mapping[str, Place],
    form: str,
    wanted: Mapping[str, Sequence[Sizes]],
    batches: Batches | None,
    *,
    seed: int,
) -> Iterator[tuple[Place, Sizes, Fitted]]:
    """Fit every wanted size of every layer, with the moments of a few layers at a time in memory.

    Args:
        model: the network as it is; it must be that again whenever the next one is asked for.
        places: its layers by name.
        form: what they become.
        wanted: sizes by layer.
        batches: for the moments; None fits weights alone.
        seed: of the search for groups.
    """
    known: dict[str, Layer] = {}
    if batches is not None:
        known = {n: places[n].layer for n in wanted if places[n].dims.ins * places[n].dims.taps <= MOST_INPUTS}
    for stage in [*(in_stages(known) if known else []), [n for n in wanted if n not in known]]:
        moments: dict[str, Moments] = {}
        if batches is not None and stage and stage[0] in known:
            moments = second_moments(model, {n: known[n] for n in stage}, batches)
        for name in stage:
            seen, layer = moments.pop(name, None), places[name].layer
            assert isinstance(layer, _ConvNd)
            for sizes in wanted[name]:
                yield places[name], sizes, fit_layer(layer, form, sizes, moments=seen, seed=seed)


def within_budget(
    model: nn.Module,
    places: Mapping[str, Place],
    form: str,
    options: Mapping[str, Sequence[Sizes]],
    macs: float,
    before: Profile,
    batches: Batches | None,
    *,
    samples: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, tuple[Sizes, Fitted]]:
    """Sizes for layers, or none, so that the network keeps a fraction of its MACs and its outputs change least.

    Args:
        model: the network; it is changed and put back.
        places: its layers by name.
        form: what they become.
        options: sizes by layer, descending by cost.
        macs: fraction to keep.
        before: the network's profile.
        batches: losses are the divergence of the outputs on them; without them, the weights' relative squared error.
        samples: of them.
        seed: of the search for groups.
        progress: called with steps done and all.

    Raises:
        BudgetError: the budget is out of reach.
    """
    prices: dict[str, list[float]] = {}
    for name, ladder in options.items():
        layer = places[name].layer
        assert isinstance(layer, _ConvNd)
        prices[name] = [float(places[name].macs), *(float(cost(layer, form, s, places[name].shapes)[0]) for s in ladder)]
    rest = before.macs - sum(p[0] for p in prices.values())
    least = rest + sum(min(p) for p in prices.values())
    if least > macs * before.macs:
        raise BudgetError(
            f"cannot reach {macs:.3f} of the macs: the lowest possible is {least / before.macs:.3f}; a shorter ignore= allows for less"
        )
    far = Divergence(model, batches, samples=samples) if batches is not None else None
    losses: dict[str, list[float]] = {name: [0.0] for name in options}
    made: dict[tuple[str, Sizes], Fitted] = {}
    total = sum(map(len, options.values()))
    for place, sizes, found in each_fitted(model, places, form, options, batches, seed=seed):
        losses[place.name].append(_alone(model, place, found, far))
        made[place.name, sizes] = found
        if progress is not None:
            progress(len(made), total)
    names = list(options)
    candidates: list[dict[str, tuple[Sizes, Fitted]]] = []
    for power in POWERS if far is not None else POWERS[:1]:
        lost = [[v**power for v in monotone(losses[n])] for n in names]
        picks = knapsack([prices[n] for n in names], lost, macs * before.macs - rest, what="macs")
        chosen = {n: options[n][i - 1] for n, i in zip(names, picks, strict=True) if i}
        candidates.append({n: (sizes, made[n, sizes]) for n, sizes in chosen.items()})
    return min(candidates, key=lambda c: _together(model, places, c, far))


def _alone(model: nn.Module, place: Place, found: Fitted, far: Divergence | None) -> float:
    """What the outputs lose with one layer exchanged."""
    if far is None:
        return found.error**2
    changed = replace_module(model, place.layer, found.module)
    try:
        return min(far(changed), MOST_LOSS)
    finally:
        replace_module(changed, found.module, place.layer)


def _together(model: nn.Module, places: Mapping[str, Place], picks: Mapping[str, tuple[Sizes, Fitted]], far: Divergence | None) -> float:
    """What the outputs lose with all picks exchanged."""
    changed = model
    for name, (_, found) in picks.items():
        changed = replace_module(changed, places[name].layer, found.module)
    try:
        return 0.0 if far is None else min(far(changed), MOST_LOSS)
    finally:
        for name, (_, found) in picks.items():
            changed = replace_module(changed, found.module, places[name].layer)


def slower(places: Mapping[str, Place], fitted: Mapping[str, tuple[Sizes, Fitted]], threads: int) -> list[str]:
    """A line on layers that take longer in ONNX Runtime than before."""
    slow: dict[str, float] = {}
    for name, (_, found) in fitted.items():
        place = places[name]
        chains = [chain([bare(place.layer)]), chain(found.module)]
        old = new = 0.0
        for shape, calls in Counter(place.shapes).items():
            one, two = time_chains(chains, shape, threads=threads)
            old, new = old + calls * one, new + calls * two
        if new > old:
            slow[name] = new / old
    if not slow:
        return []
    worst = sorted(slow, key=lambda n: -slow[n])
    return [f"slower in ONNX Runtime than the layer before: {some([f'{n} ({slow[n]:.2f} times)' for n in worst])}"]


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(n or "the network itself" for n in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
