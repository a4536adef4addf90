"""Rounding weights so that the layer's output changes least: second-order rounding, descent over codes, fitted steps.

Shapes: G groups of a convolution (1 for a linear layer), R outputs of a group, K inputs of one output. ``H_GKK`` is the covariance of those inputs:
``tr((W - Q) H (W - Q)^T)`` is the mean squared change of the layer's output, its mean aside, which the bias takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.quantization.ops import limits

_BLOCK = 128  # columns that are rounded before the others are told


def damped(h_GKK: Tensor, share: float = 0.01) -> Tensor:
    """A covariance plus ``share`` of its mean diagonal on the diagonal, so that it can be inverted; inputs that never vary count as 1."""
    mean_G = h_GKK.diagonal(dim1=1, dim2=2).mean(1)
    mean_G = torch.where(mean_G > 1e-20, mean_G, torch.ones_like(mean_G))
    return h_GKK + torch.diag_embed((share * mean_G)[:, None].expand(-1, h_GKK.shape[1]))


def gptq(w_GRK: Tensor, h_GKK: Tensor, steps_GR: Tensor, bits: int, kept_GRK: Tensor | None = None) -> Tensor:
    """Round column by column, the most varying input first; what a column loses, the columns still to come make up for.

    Examples:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, w = torch.randn(64, 8, generator=g) @ torch.randn(8, 8, generator=g), torch.randn(1, 4, 8, generator=g)
        >>> h, step = damped(x.T.cov()[None]), torch.full((1, 4), 0.4)
        >>> near, second = (w / 0.4).round().clamp(-8, 7), gptq(w, h, step, 4)
        >>> bool(output_error(w, second, h, step).sum() < output_error(w, near, h, step).sum())
        True

    Args:
        w_GRK: weights.
        h_GKK: covariance of the inputs, positive definite (`damped`).
        steps_GR: step of each output.
        bits: 2 to 8.
        kept_GRK: where codes may differ from 0; None: everywhere.

    Returns:
        Codes as floats, shape of ``w_GRK``.

    Source:
        Frantar et al., "GPTQ", ICLR 2023, algorithm 1, in the order of the covariance's diagonal.
    """
    low, high = limits(bits, True)
    order_GK = h_GKK.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    columns_GRK = order_GK[:, None].expand_as(w_GRK)
    w = w_GRK.gather(2, columns_GRK)
    h = h_GKK.gather(1, order_GK[:, :, None].expand_as(h_GKK)).gather(2, order_GK[:, None].expand_as(h_GKK))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h.double()))
    u = torch.linalg.cholesky(inverse, upper=True).to(w.dtype)
    q, s_GR, kept = torch.empty_like(w), steps_GR, None if kept_GRK is None else kept_GRK.gather(2, columns_GRK)
    for start in range(0, w.shape[2], _BLOCK):
        stop = min(start + _BLOCK, w.shape[2])
        part, errors = w[:, :, start:stop].clone(), torch.empty_like(w[:, :, start:stop])
        for j in range(stop - start):
            k = start + j
            code = (part[:, :, j] / s_GR).round_().clamp_(low, high)
            code = code if kept is None else code * kept[:, :, k]
            q[:, :, k] = code
            errors[:, :, j] = (part[:, :, j] - code * s_GR) / u[:, k, k, None]
            part[:, :, j:] -= errors[:, :, j, None] * u[:, k, None, k:stop]
        w[:, :, stop:] -= errors @ u[:, start:stop, stop:]
    return torch.empty_like(q).scatter_(2, columns_GRK, q)


def descend(
    w_GRK: Tensor, q_GRK: Tensor, h_GKK: Tensor, steps_GR: Tensor, bits: int, kept_GRK: Tensor | None = None, *, sweeps: int = 3
) -> Tensor:
    """Coordinate descent over codes: each in turn takes the value that is best given all others; the error never grows.

    Args:
        w_GRK: weights.
        q_GRK: codes to start from.
        h_GKK: covariance of the inputs.
        steps_GR: step of each output.
        bits: 2 to 8.
        kept_GRK: where codes may differ from 0; None: everywhere.
        sweeps: times every code is visited.

    Returns:
        Codes as floats.

    Source:
        Behdin et al., "QuantEase", 2023, equation 5.
    """
    low, high = limits(bits, True)
    q, s = q_GRK.clone(), steps_GR
    diagonal_GK = h_GKK.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        pull = (q * s[:, :, None] - w_GRK) @ h_GKK
        changed = False
        for start in range(0, q.shape[2], _BLOCK):
            stop = min(start + _BLOCK, q.shape[2])
            near, moves = pull[:, :, start:stop].clone(), torch.zeros_like(q[:, :, start:stop])
            for j in range(stop - start):
                k = start + j
                best = (q[:, :, k] - near[:, :, j] / (diagonal_GK[:, None, k] * s)).round_().clamp_(low, high)
                best = best if kept_GRK is None else best * kept_GRK[:, :, k]
                moves[:, :, j] = (best - q[:, :, k]) * s
                q[:, :, k] = best
                near[:, :, j:] += moves[:, :, j, None] * h_GKK[:, None, k, start + j : stop]
            if bool(moves.any()):
                changed = True
                pull[:, :, stop:] += moves @ h_GKK[:, start:stop, stop:]
        if not changed:
            break
    return q


def fitted_steps(w_GRK: Tensor, q_GRK: Tensor, h_GKK: Tensor, steps_GR: Tensor) -> Tensor:
    """For given codes the step of least output error: ``w H q / q H q``; the old one where that is not positive."""
    hq = q_GRK @ h_GKK
    best = (w_GRK * hq).sum(2) / (q_GRK * hq).sum(2).clamp(min=1e-30)
    return torch.where((best > 0.5 * steps_GR) & (best < 2 * steps_GR), best, steps_GR)


def output_error(w_GRK: Tensor, q_GRK: Tensor, h_GKK: Tensor, steps_GR: Tensor) -> Tensor:
    """Mean squared change of each output that its rounded weights cause, shape (G, R)."""
    d = q_GRK * steps_GR[:, :, None] - w_GRK
    return ((d @ h_GKK) * d).sum(2)
