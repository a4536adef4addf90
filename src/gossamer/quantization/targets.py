"""The weights that a layer should have on the inputs that reach it, which earlier rounding has changed: those that give the float layer's output.

Shapes: G groups of a convolution, R outputs of a group, K inputs of one output, N positions of all samples. ``x`` is the float input, ``q`` the one that arrives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.quantization.moments import Geometry, chosen_samples
from gossamer.quantization.rounding import damped

_DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Seen:
    """Covariances over some samples: of the arriving inputs, and of the output's error with them."""

    h_GKK: Tensor
    error_GRK: Tensor


def watch(shape: Geometry, w_GRK: Tensor, x: Tensor, q: Tensor, extra: Tensor | None = None) -> list[Seen]:
    """What each half of the samples shows; one half where there is one sample.

    Args:
        shape: how the layer reads its input.
        w_GRK: the float weights.
        x, q: the float input and the one that arrives.
        extra: what else the output should make up for, shaped as the output: the error of what it is added to.
    """
    index = chosen_samples(shape, q)
    halves = [h for h in (index[::2], index[1::2]) if len(h)]
    return [_over(shape, w_GRK, x, q, extra, half) for half in halves]


def _over(shape: Geometry, w_GRK: Tensor, x: Tensor, q: Tensor, extra: Tensor | None, index: Tensor) -> Seen:
    count, sums = 0, [torch.zeros(())] * 4
    for part in index.split(shape.at_once(q)):
        q_GKN = shape.columns(q[part])
        e_GRN = w_GRK @ (shape.columns(x[part]) - q_GKN)
        if extra is not None:
            e_GRN = e_GRN + shape.outputs_of(extra[part])
        count += q_GKN.shape[2]
        new = (q_GKN @ q_GKN.transpose(1, 2), e_GRN @ q_GKN.transpose(1, 2), q_GKN.sum(2, dtype=torch.float64), e_GRN.sum(2, dtype=torch.float64))
        sums = [a + b.double() for a, b in zip(sums, new, strict=True)]
    qq, eq, q_GK, e_GR = (s / count for s in sums)
    return Seen((qq - q_GK[:, :, None] * q_GK[:, None]).float(), (eq - e_GR[:, :, None] * q_GK[:, None]).float())


def target(w_GRK: Tensor, seen: list[Seen]) -> tuple[Tensor, float | None]:
    """The weights whose output on what arrives is nearest to the float layer's on its own input, as far as each half of the samples bears the other out.

    Example:
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
    gains = dict.fromkeys(_DAMPINGS, 0.0)
    for here, there in (seen, seen[::-1]):
        for share in _DAMPINGS:
            move = _solve(here, share)
            gains[share] += float((2 * move * there.error_GRK - (move @ there.h_GKK) * move).sum())
    best = max(gains, key=gains.__getitem__)
    if not gains[best] > 0:
        return w_GRK, None
    both = Seen((seen[0].h_GKK + seen[1].h_GKK) / 2, (seen[0].error_GRK + seen[1].error_GRK) / 2)
    return w_GRK + _solve(both, best), best


def _solve(seen: Seen, share: float) -> Tensor:
    """``error h^-1`` with a ridge of ``share`` of the mean variance."""
    factor = torch.linalg.cholesky(damped(seen.h_GKK, share).double())
    return torch.cholesky_solve(seen.error_GRK.double().transpose(1, 2), factor).transpose(1, 2).float()
