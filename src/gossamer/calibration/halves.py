"""Moments of layers' inputs over every other batch: what is fitted to one half of the data is judged on the other, for on its own it flatters itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd

from gossamer.calibration.moments import Moments, in_stages, moments_of_halves
from gossamer.sources.batches import Batch

ENOUGH = 25
"""Positions for each input of a layer: more leave little to overfit, and one fit to all of them serves."""
MOST_INPUTS = 6000
"""Layers with more inputs times kernel positions have no moments: they would take gigabytes."""
Apart = tuple[Moments | None] | tuple[Moments | None, Moments | None]
"""Moments to fit to, for all batches, or for those with even numbers and those with odd ones; None is to fit to the weights alone."""


class Halves:
    """Second moments of layers' inputs over every other batch, read a few layers at a time, and only once where they fit in memory together.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> halves = Halves(net, {"0": net[0], "1": net[1]}, [Batch((torch.randn(8, 4),), {}, None) for _ in range(3)])
        >>> [(name, [m.n for m in moments]) for name, moments in halves.of(["0"], apart=True)]
        [('0', [8, 16])]
        >>> [(name, [m.n for m in moments]) for name, moments in halves.of(["0"])]
        [('0', [24])]

    Args:
        model: the network; it must be as it is now whenever moments are asked for.
        layers: modules of it, by name.
        batches: to be swept over; None: there is no data.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Linear | _ConvNd], batches: Iterable[Batch] | None) -> None:
        self._model, self._batches = model, batches
        self._layers = {n: m for n, m in layers.items() if batches is not None and inputs_of(m) <= MOST_INPUTS}
        self._held: list[dict[str, Moments]] | None = None

    def of(self, names: Iterable[str], *, apart: bool = False) -> Iterator[tuple[str, Apart]]:
        """Layers with the moments to fit to, those without any last.

        Args:
            names: of layers.
            apart: two each where that makes a difference: for the batches with even numbers the moments over those with odd ones, and the other
                way round. Else over all batches.
        """
        names = list(names)
        wanted = {n: self._layers[n] for n in names if n in self._layers}
        if wanted and self._held is None and len(in_stages(self._layers, copies=2)) == 1:
            self._held = self._sweep(self._layers)
        for stage in [list(wanted)] if self._held is not None else in_stages(wanted, copies=2):
            halves = self._held if self._held is not None else self._sweep({n: wanted[n] for n in stage})
            for name in stage:
                yield name, _apart([half[name] for half in halves if name in half], apart)
        for name in names:
            if name not in wanted:
                yield name, (None,)

    def _sweep(self, layers: Mapping[str, nn.Linear | _ConvNd]) -> list[dict[str, Moments]]:
        return moments_of_halves(self._model, layers, self._batches or ()) if layers else []


def inputs_of(layer: nn.Linear | _ConvNd) -> int:
    """Inputs of one output, kernel positions included."""
    return layer.weight.numel() // (layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _apart(halves: list[Moments], apart: bool) -> Apart:
    if len(halves) < 2:  # one batch, or a layer that ran in one half alone, or never
        return (halves[0] if halves else None,)
    even, odd = halves
    if apart and even.n + odd.n < ENOUGH * even.mean.shape[1]:
        return odd, even
    return (even + odd,)
