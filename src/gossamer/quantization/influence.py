"""Ranges of activations by what rounding them does to the network's outputs, to first order.

A value that sticks out sets the range where squared errors count alike, even if all that reads it has saturated there. With ``J`` the outputs' derivative by an
activation and ``e`` its rounding error, the outputs are off by ``J e``, errors that add up or cancel included. `gossamer.quantization.derivatives` gives
``v' J`` for random signs ``v``, and since ``e`` depends on the value alone, its sums over bins of values tell the noise of any range.

Shapes: S samples, B bins, N candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from gossamer.quantization.derivatives import derivatives
from gossamer.quantization.observers import Histogram, rounding_error

BINS = 8192
_ROOM = 1.1  # ranges are judged on the values and on ones that go so much further, as other data may
_LEAST_SAMPLES = 8
_COARSE, _FINE = torch.logspace(0, -1.3, 27), torch.linspace(1.12, 0.88, 17)  # fractions of a range that are tried
_TWO_SIDED = ("high", _COARSE), ("low", _COARSE), ("high", _FINE), ("low", _FINE)


class Influence:
    """``v' J`` of one activation, summed over the entries in each bin of values.

    Examples:
        >>> seen = Influence(0.0, 8.0)
        >>> x = torch.linspace(0, 1, 999).expand(8, -1).clone(); x[:, 0] = 8.0
        >>> gradient = torch.ones_like(x); gradient[:, 0] = 0.0  # nothing reads what sticks out
        >>> seen.update(x, gradient)
        >>> low, high = seen.least((0.0, 8.0), 4)
        >>> low, high < 1.5
        (0.0, True)
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = min(low, 0.0), max(high, 0.0)
        self.width = max((self.high - self.low) / BINS, 1e-30)
        self._sums: list[Tensor] = []

    def update(self, x: Tensor, gradient: Tensor) -> None:
        """Count values and what the outputs' random combination changes with them, both (samples, entries)."""
        rows = torch.arange(len(x), dtype=torch.int32, device=x.device)[:, None] * BINS
        place = ((x - self.low) / self.width).clamp_(0, BINS - 1).int().add_(rows)
        sums = torch.bincount(place.flatten(), gradient.flatten(), minlength=len(x) * BINS)
        self._sums.append(sums.view(len(x), BINS).bfloat16().cpu())  # two bytes: there are many points

    def sums(self) -> Tensor:
        """(S, B), samples in the order they came."""
        return torch.cat(self._sums).float()

    def values(self) -> Tensor:
        """(B,) a value in each bin, not at the same place in each, which a step could fall in with; 0 where a bin holds it, as many values are."""
        x_B = self.low + (torch.arange(BINS) + torch.rand(BINS, generator=torch.Generator().manual_seed(0))) * self.width
        x_B[min(BINS - 1, int(-self.low / self.width))] = 0.0
        return x_B

    def noise(self, low_N: Tensor, high_N: Tensor, bits: int, sums_SB: Tensor, room: float = 1.0) -> Tensor:
        """Squared error of each sample's outputs over their mean square with each range, (N, S), the values times ``room``."""
        return (rounding_error(self.values() * room, low_N, high_N, bits) @ sums_SB.T).square_()

    def least(self, usual: tuple[float, float], bits: int, kept: slice = slice(None)) -> tuple[float, float]:
        """The range of least noise, or the usual one, unless each half of the samples bears out that what the other half gives is better.

        Args:
            usual: the range that is taken without knowing what the outputs depend on.
            bits: of the codes.
            kept: samples to go by.
        """
        sums_SB = self.sums()[kept]
        if len(sums_SB) < _LEAST_SAMPLES or not bool(sums_SB.isfinite().all()):
            return usual
        coarse = _times((self.low, self.high), _COARSE, "both")
        noise_NS = self._judged(*coarse, bits, sums_SB)
        halves, found, before = (slice(0, None, 2), slice(1, None, 2)), 0.0, 0.0
        for fitted, other in (halves, halves[::-1]):
            start = coarse[0][best := int(noise_NS[:, fitted].mean(1).argmin())].item(), coarse[1][best].item()
            half = self._refined(start, bits, sums_SB[fitted])
            lows, highs = torch.tensor([half[0], usual[0]]), torch.tensor([half[1], usual[1]])
            noise_2S = self._judged(lows, highs, bits, sums_SB[other])
            found, before = found + noise_2S[0].mean().item(), before + noise_2S[1].mean().item()
        if found >= before:
            return usual
        best = int(noise_NS.mean(1).argmin())
        return self._refined((coarse[0][best].item(), coarse[1][best].item()), bits, sums_SB)

    def _judged(self, low_N: Tensor, high_N: Tensor, bits: int, sums_SB: Tensor) -> Tensor:
        return self.noise(low_N, high_N, bits, sums_SB) + self.noise(low_N, high_N, bits, sums_SB, _ROOM)

    def _refined(self, interval: tuple[float, float], bits: int, sums_SB: Tensor) -> tuple[float, float]:
        low, high = interval
        for sides, fractions in _TWO_SIDED if self.low < 0 < self.high else (("both", _FINE),):
            if fractions is _COARSE:
                low, high = self.low if sides == "low" else low, self.high if sides == "high" else high
            lows, highs = _times((low, high), fractions, sides)
            best = int(self._judged(lows, highs, bits, sums_SB).mean(1).argmin())
            low, high = max(lows[best].item(), self.low), min(highs[best].item(), self.high)
        return low, high


def influences(module: fx.GraphModule, histograms: Mapping[fx.Node, Histogram], leaves: list[Any]) -> dict[fx.Node, Influence]:
    """Of the activations that have histograms; empty where the network has no derivative, or samples cannot be told apart.

    Args:
        module: a float graph.
        histograms: over at least these samples.
        leaves: flat inputs.
    """
    found = {n: Influence(h.low, h.high) for n, h in histograms.items()}
    if not module.meta["dynamic_batch"]:
        return {}
    try:
        for samples, found_there in derivatives(module, found, leaves):
            for node, x, gradient in found_there:
                if gradient.shape[0] % samples == 0:
                    found[node].update(x.reshape(samples, -1), gradient.reshape(samples, -1))
    except RuntimeError:  # no derivative of some operator, or of values in place
        return {}
    most = max((len(i._sums) for i in found.values()), default=0)
    return {n: i for n, i in found.items() if most and len(i._sums) == most}


def _times(interval: tuple[float, float], fractions: Tensor, sides: str) -> tuple[Tensor, Tensor]:
    """Ranges with one end or both moved, (N,) each."""
    low, high = interval
    one = torch.ones_like(fractions)
    return low * (one if sides == "high" else fractions), high * (one if sides == "low" else fractions)
