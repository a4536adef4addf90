"""What stands in for layers, judged by the network's outputs: each alone, and a choice of them together, on data that they were not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from typing import Protocol, TypeVar

from torch import Tensor, nn

from gossamer.calibration.curvature import Change, predicted
from gossamer.calibration.divergence import Divergence
from gossamer.exchange import Layer
from gossamer.plan import replace_module

HELD_BYTES = 2**29
"""Of what stand-ins lack of their layers' weights, held at a time; what is beyond is judged in a pass of its own."""
MEASURED_MACS = 2e11
"""What measuring each stand-in may cost, seconds on one core; beyond that losses are predicted, well where they are small and too low where large."""


class StandIn(Protocol):
    """What is fitted in place of a layer: its modules, what they lack of its weight and add to its bias, and their relative error."""

    @property
    def module(self) -> nn.Sequential: ...
    @property
    def missing(self) -> Tensor: ...
    @property
    def shift(self) -> Tensor | None: ...
    @property
    def error(self) -> float: ...


S = TypeVar("S", bound=StandIn)
K = TypeVar("K", bound=Hashable)
Fits = Iterable[tuple[str, K, tuple[S, S]]]
"""Layer, which of its options, and what stands in for it on even and on odd batches (see `Halves`)."""


def alone(
    model: nn.Module,
    layers: Mapping[str, Layer],
    fits: Fits[K, S],
    far: Divergence | None,
    *,
    macs: float,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> dict[str, dict[K, float]]:
    """What the outputs lose with each stand-in alone: measured where that is cheap or no gradient reaches it, else predicted.

    Args:
        model: the network, which stays as it is.
        layers: modules of it by name.
        fits: all options of a layer one after the other.
        far: the distance; None takes the squared relative errors.
        macs: of the network, for each sample.
        seed: of the prediction.
        step: called when an option is fitted, and again when it is judged.
    """
    out: dict[str, dict[K, float]] = {}
    waiting: dict[str, list[tuple[K, tuple[S, S]]]] = {}
    size = 0

    def judge() -> None:
        values = _judged(model, layers, {n: [pair for _, pair in found] for n, found in waiting.items()}, far, macs, seed)
        for name, found in waiting.items():
            out[name] = {}
            for (option, _), value in zip(found, values[name], strict=True):
                out[name][option] = value
                step()
        waiting.clear()

    for name, option, pair in fits:
        if name not in waiting and size > HELD_BYTES:
            judge()
            size = 0
        waiting.setdefault(name, []).append((option, pair))
        size += sum(m.numel() * m.element_size() for m in {id(f): f.missing for f in pair}.values())
        step()
    judge()
    return out


def best_together(
    model: nn.Module,
    layers: Mapping[str, Layer],
    candidates: Sequence[Mapping[str, K]],
    fit: Callable[[Mapping[str, Sequence[K]], bool], Fits[K, S]],
    far: Divergence | None,
) -> tuple[dict[str, K], dict[str, S]]:
    """Of some choices of options for layers, the one whose network as a whole loses least, and what stands in for its layers.

    Args:
        model: the network, which stays as it is.
        layers: modules of it by name.
        candidates: without ``far`` the first one is taken.
        fit: gives options fitted, apart for even and odd batches, or to all of them.
        far: the distance that is measured.
    """
    different = [c for i, c in enumerate(candidates) if c not in candidates[:i]]
    best, made = different[0], dict[tuple[str, K], tuple[S, S]]()
    if far is not None and len(different) > 1:
        wanted = {n: list(dict.fromkeys(c[n] for c in different if n in c)) for n in layers if any(n in c for c in different)}
        made = {(name, option): pair for name, option, pair in fit(wanted, True)}
        best = min(different, key=lambda c: min(_together(model, layers, {n: made[n, o] for n, o in c.items()}, far), inf))
    found = {n: made[n, o][0] for n, o in best.items() if (n, o) in made and made[n, o][0] is made[n, o][1]}
    found |= {name: pair[0] for name, _, pair in fit({n: [o] for n, o in best.items() if n not in found}, False)}
    return dict(best), {n: found[n] for n in best}


@contextmanager
def exchanged(model: nn.Module, modules: Mapping[nn.Module, nn.Module]) -> Iterator[nn.Module]:
    """The network with some modules exchanged, which are put back afterwards."""
    changed = model
    try:
        for old, new in modules.items():
            changed = replace_module(changed, old, new)
        yield changed
    finally:
        for old, new in modules.items():
            changed = replace_module(changed, new, old)


def _judged(
    model: nn.Module, layers: Mapping[str, Layer], fits: Mapping[str, Sequence[tuple[S, S]]], far: Divergence | None, macs: float, seed: int
) -> dict[str, list[float]]:
    if far is None:
        return {n: [pair[0].error ** 2 for pair in found] for n, found in fits.items()}
    told: dict[str, list[float]] = {}
    if sum(map(len, fits.values())) * far.count * macs > MEASURED_MACS:
        changes = {
            n: [tuple(Change(-f.missing, f.shift) for f in {id(f): f for f in pair}.values()) for pair in found]
            for n, found in fits.items()
        }
        told = predicted(model, {n: layers[n] for n in fits}, changes, far, seed=seed)
    return {n: told.get(n) or [_together(model, layers, {n: pair}, far) for pair in found] for n, found in fits.items()}


def _together(model: nn.Module, layers: Mapping[str, Layer], fits: Mapping[str, tuple[S, S]], far: Divergence) -> float:
    """What the outputs lose with layers exchanged, each batch with what was not fitted to it."""
    totals = []
    for first in (0, 1):
        with exchanged(model, {layers[n]: pair[first].module for n, pair in fits.items()}) as changed:
            totals.append(far.total(changed, first, 2))
    return far.mean(totals)
