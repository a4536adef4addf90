"""Ranges of activations, from a histogram of constant size that grows by doubling its reach."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OBSERVERS = ("output", "mse", "percentile", "minmax", "moving_average", "entropy")
BINS = 8192
_MOMENTUM = 0.9  # what the moving average of a batch's extremes keeps of the batches before
_MOST = 1 << 18  # elements of one tensor that go into a histogram, or a variance; the extremes always see all


class Histogram:
    """Streaming histogram over ``[-reach, reach)``; when a value lies outside, the reach doubles and bins merge in pairs.

    Examples:
        >>> h = Histogram()
        >>> h.update(torch.tensor([0.0, 1.0])); h.update(torch.tensor([-8.0]))
        >>> h.low, h.high, int(h.counts.sum())
        (-8.0, 1.0, 3)
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.reach = 0.0
        self.low, self.high = 0.0, 0.0
        self.average: tuple[float, float] | None = None
        self.least_noise: Callable[[tuple[float, float], int], tuple[float, float]] | None = None

    def update(self, x: Tensor, ends: tuple[float, float] | None = None) -> None:
        """Count the values of ``x``, any shape; ``ends`` are its extremes where they are known. ValueError where one is NaN or infinite."""
        if not x.numel():
            return
        low, high = ends or (float(v) for v in torch.aminmax(x))
        if not (low > -float("inf") and high < float("inf")):  # also true of NaN
            raise ValueError("not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        ends = min(low, 0.0), max(high, 0.0)
        kept = _MOMENTUM if self.average else 0.0
        self.average = tuple(kept * old + (1 - kept) * new for old, new in zip(self.average or ends, ends, strict=True))  # type: ignore[assignment]
        largest = max(-low, high)
        if largest == 0:
            self.counts[BINS // 2] += x.numel()
            return
        if self.reach == 0:
            self.reach, zeros = largest * 1.0001, float(self.counts.sum())
            self.counts.zero_()[BINS // 2] = zeros
        while largest >= self.reach:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts.zero_()[BINS // 4 : BINS // 4 + BINS // 2] = merged
            self.reach *= 2
        flat = x.detach().flatten()
        stride = -(-flat.numel() // _MOST) | 1
        seen = flat[::stride].float().cpu()
        self.counts += torch.histc(seen, BINS, -self.reach, self.reach).double() * (flat.numel() / seen.numel())

    def centres(self) -> Tensor:
        """Middles of the bins, float64, shape ``(BINS,)``."""
        return (torch.arange(BINS, dtype=torch.float64) + 0.5 - BINS // 2) * (2 * self.reach / BINS)

    def range(self, observer: str, bits: int = 8) -> tuple[float, float]:
        """The interval to represent, with 0 inside.

        Args:
            observer: ``"minmax"``, ``"moving_average"`` (of the batches' extremes), ``"percentile"`` (99.99% of values), ``"entropy"``
                (least Kullback-Leibler divergence), ``"mse"`` (least squared error) or ``"output"`` (by ``least_noise``, given the
                range of least squared error and the bits; that range where it is not known what the outputs depend on).
            bits: of the codes.
        """
        if observer == "minmax" or self.reach == 0:
            return self.low, self.high
        if observer == "moving_average":
            assert self.average is not None
            return self.average
        if observer == "percentile":
            return self._percentile(0.9999)
        if observer == "entropy":
            return self._least_divergence(bits)
        least = self._least_error(bits)
        return self.least_noise(least, bits) if observer == "output" and self.least_noise is not None else least

    def _percentile(self, share: float) -> tuple[float, float]:
        cumulative = self.counts.cumsum(0) / self.counts.sum()
        edges = torch.linspace(-self.reach, self.reach, BINS + 1, dtype=torch.float64)
        one_sided = self.low >= 0 or self.high <= 0
        tail = (1 - share) * (1 if one_sided else 0.5)
        low = float(edges[int(torch.searchsorted(cumulative, tail, right=True))])
        high = float(edges[min(BINS, int(torch.searchsorted(cumulative, 1 - tail)) + 1)])
        return max(self.low, min(low, 0.0)), min(self.high, max(high, 0.0))

    def _least_divergence(self, bits: int) -> tuple[float, float]:
        """Both ends shrunk alike until the histogram of what is represented is nearest to the whole one, outliers counted at the ends.

        Source: Migacz, "8-bit Inference with TensorRT", 2017, for ranges on both sides of zero.
        """
        used = self.counts > 0
        x_B, n_B = self.centres()[used], self.counts[used]
        fractions, levels = torch.linspace(1.0, 0.25, 76, dtype=torch.float64), 1 << bits
        low_F1, high_F1 = (fractions * self.low)[:, None], (fractions * self.high)[:, None]
        step_F1 = ((high_F1 - low_F1) / (levels - 1)).clamp(min=1e-30)
        inside_FB = (x_B >= low_F1 - step_F1 / 2) & (x_B <= high_F1 + step_F1 / 2)
        code_FB = ((x_B - low_F1) / step_F1).round_().clamp_(0, levels - 1).long()
        kept_FB = n_B * inside_FB
        mass_FL = torch.zeros(len(fractions), levels, dtype=torch.float64).scatter_add_(1, code_FB, kept_FB)
        bins_FL = torch.zeros_like(mass_FL).scatter_add_(1, code_FB, inside_FB.double())
        q_FB = (mass_FL / bins_FL.clamp(min=1)).gather(1, code_FB) * inside_FB
        p_FB = kept_FB.clone()
        for side in (1.0, -1.0):  # what is cut off counts at the last bin inside
            lost_F = (n_B * (~inside_FB & (side * x_B > 0))).sum(1)
            end_F = torch.where(inside_FB, side * x_B, -torch.inf).argmax(1)
            p_FB.scatter_add_(1, end_F[:, None], lost_F[:, None])
        p_FB, q_FB = p_FB / p_FB.sum(1, keepdim=True), q_FB / q_FB.sum(1, keepdim=True)
        divergence_F = torch.where(p_FB > 0, p_FB * (p_FB.clamp(min=1e-30) / q_FB.clamp(min=1e-30)).log(), 0.0).sum(1)
        best = int(divergence_F.argmin())
        return float(low_F1[best]), float(high_F1[best])

    def _least_error(self, bits: int) -> tuple[float, float]:
        used = self.counts > 0
        x_B, n_B = self.centres()[used].float(), self.counts[used].float()
        n_B = n_B / n_B.sum()
        fractions = torch.linspace(1.0, 0.25, 61)
        low, high = torch.tensor([self.low]), torch.tensor([self.high])
        for sides in ("both", "both") if 0.0 in (self.low, self.high) else ("both", "high", "low", "high", "low"):
            tried_low = low * fractions if sides in ("both", "low") else low.expand(len(fractions))
            tried_high = high * fractions if sides in ("both", "high") else high.expand(len(fractions))
            best = int((rounding_error(x_B, tried_low, tried_high, bits).square_() @ n_B).argmin())
            low, high = tried_low[best : best + 1], tried_high[best : best + 1]
            fractions = torch.linspace(1.05, 0.7, 36)
            low, high = low.clamp(min=self.low), high.clamp(max=self.high)
        return float(low), float(high)


class Channels:
    """Largest magnitude, smallest value and variance of each channel (dimension 1), in one pass over batches; of very many positions the variance takes evenly spread ones.

    Examples:
        >>> seen = Channels()
        >>> seen.update(torch.tensor([[1.0, -5.0], [3.0, -5.0]]))
        (-5.0, 3.0)
        >>> seen.largest.tolist(), seen.variance().tolist()
        ([3.0, 5.0], [1.0, 0.0])
    """

    def __init__(self) -> None:
        self.largest, self.smallest = torch.zeros(()), torch.full((), torch.inf)
        self.count, self.mean, self.scatter = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def update(self, x: Tensor) -> tuple[float, float]:
        """Count values of shape (batch, channels, ...), at least one; their extremes."""
        x_SCN = x.detach().flatten(2) if x.dim() > 2 else x.detach()[:, :, None]
        low, high = x_SCN.amin(2).amin(0), x_SCN.amax(2).amax(0)
        self.largest = torch.maximum(self.largest.to(low), torch.maximum(high, -low))
        self.smallest = torch.minimum(self.smallest.to(low), low)
        rows = x_SCN[:, :, :: -(-x.numel() // _MOST)].movedim(1, 0).flatten(1)
        mean, new = rows.mean(1), rows.shape[1]
        scatter, apart = (rows - mean[:, None]).square().sum(1).double(), mean.double() - self.mean.to(rows.device)
        share = new / (self.count + new)
        self.scatter = self.scatter.to(rows.device) + scatter + self.count * share * apart.square()
        self.mean, self.count = self.mean.to(rows.device) + share * apart, self.count + new
        return float(low.min()), float(high.max())

    def variance(self) -> Tensor:
        """Of each channel, float32."""
        return (self.scatter / self.count).float()


def rounding_error(x_B: Tensor, low_N: Tensor, high_N: Tensor, bits: int) -> Tensor:
    """What rounding adds to each value with each range, (N, B)."""
    step_N1 = ((high_N - low_N) / ((1 << bits) - 1)).clamp(min=1e-30)[:, None]
    zero_N1 = (-low_N[:, None] / step_N1).round_()
    return torch.div(x_B, step_N1).round_().add_(zero_N1).clamp_(0, (1 << bits) - 1).sub_(zero_N1).mul_(step_N1).sub_(x_B)


def affine(low: float, high: float, bits: int = 8) -> tuple[float, int]:
    """Step and zero point of an unsigned affine quantiser that covers ``[low, high]`` and represents 0 exactly.

    Examples:
        >>> affine(-1.0, 1.55)
        (0.01, 100)

    Returns:
        The step, positive, rounded to float32, and the zero point, 0 to ``2^bits - 1``. An empty interval gets step 1.
    """
    low, high, levels = min(low, 0.0), max(high, 0.0), (1 << bits) - 1
    if high - low < 1e-30:
        return 1.0, 0
    step = (high - low) / levels
    zero = min(levels, max(0, round(-low / step)))
    if zero:  # rounding the zero point must not cut off the end that it moved away from
        step = max(-low / zero, high / (levels - zero) if zero < levels else 0.0)
    return float(f"{step:.7g}"), zero
