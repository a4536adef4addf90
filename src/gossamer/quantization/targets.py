"""The weights that a layer should have on the inputs that reach it, which earlier rounding has changed: those that give the float layer's output.

Shapes: G groups of a convolution, R outputs of a group, K inputs of one output, N positions of all samples. ``x`` is the float input, ``q`` the one that arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.quantization.moments import Geometry, chosen_samples
from gossamer.quantization.rounding import damped

_ROUNDING = 1e-6  # of a float32 value, what its computation may have rounded
_RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Clipped:
    """What a layer should give, and the ends that rounding and clips cut it off at: past them nothing sees a difference.

    Examples:
        >>> clipped = Clipped(torch.tensor([[1.0], [7.0], [9.0]]), 0.0, 6.0)
        >>> clipped.error(clipped.wanted, torch.tensor([[2.0], [6.5], [5.0]])).flatten().tolist()
        [-1.0, 0.0, 1.0]
    """

    wanted: Tensor
    low: float
    high: float

    def error(self, wanted: Tensor, got: Tensor) -> Tensor:
        """What is missing from ``got``, as far as it is seen."""
        return wanted.clamp(self.low, self.high) - got.clamp(self.low, self.high)


@dataclass(frozen=True)
class Seen:
    """Moments over positions of some samples, weighted or not, in float64: means of the arriving inputs ``q`` and of the output's errors ``e``, and sums of products about
    the means, which are taken part by part: products of float32 values far from zero leave nothing of a small variance.
    """

    count: float
    q_GK: Tensor
    e_GR: Tensor
    qq_GKK: Tensor
    eq_GRK: Tensor

    @classmethod
    def of(cls, q_GKN: Tensor, e_GRN: Tensor, weights_N: Tensor | None = None) -> Seen:
        """Of the positions of one part; weights are positive."""
        n = float(q_GKN.shape[2] if weights_N is None else weights_N.sum())
        q_GK, e_GR = (t.mean(2) if weights_N is None else t @ weights_N / n for t in (q_GKN, e_GRN))
        q_GKN, e_GRN = q_GKN - q_GK[:, :, None], e_GRN - e_GR[:, :, None]
        weighted_GNK = (q_GKN if weights_N is None else q_GKN * weights_N).transpose(1, 2)
        products = q_GKN @ weighted_GNK, e_GRN @ weighted_GNK
        return cls(n, q_GK.double(), e_GR.double(), products[0].double(), products[1].double())

    def __add__(self, other: Seen) -> Seen:
        """Both parts. Source: Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983, equation 2.1."""
        n = self.count + other.count
        share, q_GK, e_GR = other.count / n, other.q_GK - self.q_GK, other.e_GR - self.e_GR
        between_GKK, between_GRK = q_GK[:, :, None] * q_GK[:, None], e_GR[:, :, None] * q_GK[:, None]
        return Seen(
            n,
            self.q_GK + share * q_GK,
            self.e_GR + share * e_GR,
            self.qq_GKK + other.qq_GKK + self.count * share * between_GKK,
            self.eq_GRK + other.eq_GRK + self.count * share * between_GRK,
        )

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Of the inputs, (G, K, K), and of the errors with them, (G, R, K), float32; 0 for inputs that vary by no more than float32 rounds them."""
        h_GKK, error_GRK = self.qq_GKK / self.count, self.eq_GRK / self.count
        varies_GK = h_GKK.diagonal(dim1=1, dim2=2) > (_ROUNDING * self.q_GK).square()
        h_GKK = h_GKK * (varies_GK[:, :, None] & varies_GK[:, None])
        return h_GKK.float(), (error_GRK * varies_GK[:, None]).float()


def watch(
    shape: Geometry,
    w_GRK: Tensor,
    x: Tensor,
    q: Tensor,
    clipped: Clipped | None = None,
    pieces: int = 1,
    weights: Tensor | None = None,
) -> list[Seen]:
    """What each half of the samples shows; one part where there is one sample. Where there are very many positions, of evenly chosen samples.

    Args:
        shape: how the layer reads its input.
        w_GRK: the float weights.
        x, q: the float input and the one that arrives.
        clipped: where values past a clip count as the clip's end.
        pieces: of so many alike these samples are one.
        weights: of the positions, shaped as the output without its channels; alike where that is not its shape.
    """
    index = chosen_samples(shape, q, pieces)
    return [_over(shape, w_GRK, x, q, clipped, weights, half) for half in (index[::2], index[1::2]) if len(half)]


def _over(
    shape: Geometry,
    w_GRK: Tensor,
    x: Tensor,
    q: Tensor,
    clipped: Clipped | None,
    weights: Tensor | None,
    index: Tensor,
) -> Seen:
    parts = []
    for part in index.split(shape.at_once(q)) if q.dim() > 1 else [...]:
        q_GKN = shape.columns(q[part])
        e_GRN = w_GRK @ (shape.columns(x[part]) - q_GKN)
        if clipped is not None:
            y_GRN = shape.outputs_of(clipped.wanted[part])
            e_GRN = clipped.error(y_GRN, y_GRN - e_GRN)
        each = None if weights is None or weights.shape[0] != q.shape[0] else weights[part].flatten()
        parts.append(Seen.of(q_GKN, e_GRN, each if each is not None and len(each) == q_GKN.shape[2] else None))
    return sum(parts[1:], parts[0])


def joined(pieces: Sequence[Sequence[Seen]]) -> list[Seen]:
    """The halves that `watch` found in pieces of the samples, as halves of all of them; the first sample of every other piece goes with the second half."""
    halves: list[list[Seen]] = [[], []]
    for i, piece in enumerate(pieces):
        for j, seen in enumerate(piece):
            halves[(i + j) % 2].append(seen)
    return [sum(found[1:], found[0]) for found in halves if found]


def target(w_GRK: Tensor, seen: list[Seen]) -> tuple[Tensor, float | None]:
    """The weights whose output on what arrives is nearest to the float layer's on its own input, as far as each half of the samples bears the other out.

    Examples:
        >>> g = torch.Generator().manual_seed(0)
        >>> w, x = torch.randn(1, 2, 3, generator=g), torch.randn(400, 3, generator=g)
        >>> found, _ = target(w, watch(Geometry(1, 2, 3, (), (), (), ()), w, x, 0.5 * x))
        >>> bool(torch.allclose(found, 2 * w, rtol=0.05))
        True

    Args:
        w_GRK: float weights.
        seen: of `watch`.

    Returns:
        Weights of that shape, and the ridge, as a part of the mean variance, that did best on the other half; None where the float weights did.

    Source:
        Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", ICML 2025, arXiv:2504.02692, section 3, solved by ridge regression.
    """
    if len(seen) < 2:
        return w_GRK, None
    gains, halves = dict.fromkeys(_RIDGES, 0.0), [s.covariances() for s in seen]
    for here, (h_GKK, error_GRK) in zip(halves, halves[::-1], strict=True):
        for ridge in _RIDGES:
            move = _solve(*here, ridge)
            gains[ridge] += float((2 * move * error_GRK - (move @ h_GKK) * move).sum())
    best = max(gains, key=gains.__getitem__)
    if not gains[best] > 0:
        return w_GRK, None
    return w_GRK + _solve(*(seen[0] + seen[1]).covariances(), best), best


def _solve(h_GKK: Tensor, error_GRK: Tensor, ridge: float) -> Tensor:
    """``error h^-1`` with a ridge, a part of the mean variance, on ``h``'s diagonal."""
    factor = torch.linalg.cholesky(damped(h_GKK, ridge).double())
    return torch.cholesky_solve(error_GRK.double().transpose(1, 2), factor).transpose(1, 2).float()
