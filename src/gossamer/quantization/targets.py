"""The weights that a layer should have on the inputs that reach it, which earlier rounding has changed: those that give the float layer's output.

Shapes: G groups of a convolution, R outputs of a group, K inputs of one output, N positions of all samples. ``x`` is the float input, ``q`` the one that arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.calibration import JointMoments
from gossamer.quantization.moments import Geometry, chosen_samples
from gossamer.quantization.rounding import damped

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


def watch(
    shape: Geometry,
    w_GRK: Tensor,
    x: Tensor,
    q: Tensor,
    clipped: Clipped | None = None,
    pieces: int = 1,
    weights: Tensor | None = None,
) -> list[JointMoments]:
    """Moments of the arriving inputs and the output's errors over each half of the samples; one part where there is one sample.

    Where there are very many positions, of evenly chosen samples.

    Args:
        shape: how the layer reads its input.
        w_GRK: the float weights.
        x, q: the float input and the one that arrives.
        clipped: where values past a clip count as the clip's end.
        pieces: of so many alike these samples are one.
        weights: of the positions, shaped as the output without its channels; None: alike.
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
) -> JointMoments:
    parts = []
    for part in index.split(shape.at_once(q)) if q.dim() > 1 else [...]:
        q_GKN = shape.columns(q[part])
        e_GRN = w_GRK @ (shape.columns(x[part]) - q_GKN)
        if clipped is not None:
            y_GRN = shape.outputs_of(clipped.wanted[part])
            e_GRN = clipped.error(y_GRN, y_GRN - e_GRN)
        parts.append(JointMoments.of(q_GKN, e_GRN, None if weights is None else weights[part].flatten()))
    return sum(parts[1:], parts[0])


def joined(pieces: Sequence[Sequence[JointMoments]]) -> list[JointMoments]:
    """The halves that `watch` found in pieces of the samples, as halves of all of them; the first sample of every other piece goes with the second half."""
    halves: list[list[JointMoments]] = [[], []]
    for i, piece in enumerate(pieces):
        for j, seen in enumerate(piece):
            halves[(i + j) % 2].append(seen)
    return [sum(found[1:], found[0]) for found in halves if found]


def target(w_GRK: Tensor, seen: list[JointMoments]) -> tuple[Tensor, float | None]:
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
