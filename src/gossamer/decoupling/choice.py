"""Convolutions fitted one by one, sizes allocated to a budget of MACs, and which of them got slower."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count

from torch import nn
from torch.nn.modules.conv import _ConvNd

from gossamer.calibration import Batches, Divergence, Fits, Halves, alone, best_together
from gossamer.decoupling.fitting import Fitted, fit_layer
from gossamer.decoupling.forms import Sizes, cost
from gossamer.errors import BudgetError
from gossamer.exchange import Place, bare
from gossamer.profiling.chains import chain as nodes_of
from gossamer.profiling.chains import time_chains
from gossamer.result import Profile
from gossamer.search import knapsack, monotone

MOST_LOSS = 1e9
POWERS = (1.0, 0.5, 2.0)
"""Of the losses: sums of single losses predict joint ones only roughly, so allocations by each power are compared by the whole network's."""


def fit_all(
    halves: Halves, places: Mapping[str, Place], form: str, wanted: Mapping[str, Sequence[Sizes]], *, seed: int, apart: bool = False
) -> Fits[Sizes, Fitted]:
    """Fit every wanted size of every layer.

    Args:
        halves: of the layers' inputs.
        places: layers by name.
        form: what they become.
        wanted: sizes by layer.
        seed: of the search for groups.
        apart: where moments are few, fitted twice, to be judged on even batches and on odd ones (see `gossamer.calibration.Halves`).
    """
    for name, moments in halves.of(wanted, apart=apart):
        layer = places[name].layer
        assert isinstance(layer, _ConvNd)
        for sizes in wanted[name]:
            made = [fit_layer(layer, form, sizes, moments=m, seed=seed) for m in moments]
            yield name, sizes, (made[0], made[-1])


def within_budget(
    model: nn.Module,
    places: Mapping[str, Place],
    form: str,
    options: Mapping[str, Sequence[Sizes]],
    macs: float,
    before: Profile,
    batches: Batches | None,
    *,
    per_sample: float,
    samples: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, tuple[Sizes, Fitted]]:
    """Sizes for layers, or none, so that the network keeps a fraction of its MACs and its outputs change least.

    Args:
        model: the network, which stays as it is.
        places: its layers by name.
        form: what they become.
        options: sizes by layer, descending by cost.
        macs: fraction to keep.
        before: the network's profile.
        batches: losses are the divergence of the outputs on them; without them, the weights' relative squared error.
        per_sample: multiply-adds of the network.
        samples: of the batches.
        seed: of the search for groups.
        progress: called with steps done and all: each size is fitted, then judged.

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
    layers = {n: places[n].layer for n in options}
    halves = Halves(model, layers, batches)
    done, total = count(1), 2 * sum(map(len, options.values()))

    def step() -> None:
        if progress is not None:
            progress(next(done), total)

    def fit(wanted: Mapping[str, Sequence[Sizes]], apart: bool) -> Fits[Sizes, Fitted]:
        return fit_all(halves, places, form, wanted, seed=seed, apart=apart)

    lost = alone(model, layers, fit(options, far is not None), far, macs=per_sample, seed=seed, step=step)
    losses = {n: monotone([0.0, *(min(lost[n][s], MOST_LOSS) for s in ladder)]) for n, ladder in options.items()}
    names = list(options)
    candidates = []
    for power in POWERS if far is not None else POWERS[:1]:
        picks = knapsack([prices[n] for n in names], [[v**power for v in losses[n]] for n in names], macs * before.macs - rest, what="macs")
        candidates.append({n: options[n][i - 1] for n, i in zip(names, picks, strict=True) if i})
    best, fitted = best_together(model, layers, candidates, fit, far)
    return {n: (best[n], fitted[n]) for n in best}


def slower(places: Mapping[str, Place], fitted: Mapping[str, tuple[Sizes, Fitted]], threads: int) -> list[str]:
    """A line on layers that take longer in ONNX Runtime than before."""
    slow: dict[str, float] = {}
    for name, (_, found) in fitted.items():
        place = places[name]
        chains = [nodes_of([bare(place.layer)]), nodes_of(found.module)]
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
