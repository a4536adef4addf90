"""Steps of a weight: the largest value, or the least squared error over a grid. W is (channels, elements of one channel)."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.quantization.ops import along, limits

_BLOCK = 1 << 18  # elements of one work buffer: small enough for a processor's cache


def minmax_steps(w: Tensor, bits: int = 8, axis: int | None = 0) -> Tensor:
    """Step per channel that covers the largest magnitude: ``max|w| / (2^(bits-1) - 1)``.

    Example:
        >>> minmax_steps(torch.tensor([[1.0, -127.0], [0.0, 0.0]]))
        tensor([1., 1.])

    Args:
        w: a weight of any shape.
        bits: 2 to 8.
        axis: the dimension that has a step of its own for each index; None for one step.

    Returns:
        Positive float32 steps, shape ``(w.shape[axis],)``, or ``()``. A channel of zeros gets the median of the others' steps (1 where
        all are zero): any step stores it exactly, and a tiny one would overflow what is multiplied by it.
    """
    largest = _rows(w, axis).abs().amax(1) / limits(bits, True)[1]
    return _shaped(_sane(largest), axis)


def mse_steps(w: Tensor, bits: int = 8, axis: int | None = 0, *, candidates: int = 200) -> Tensor:
    """Step per channel of least squared rounding error, by grid search: ``argmin_S sum (w - clamp(round(w / S)) S)^2``.

    Example:
        >>> w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
        >>> worse, better = (fake_quantize(w, s, 4, 0).sub(w).square().mean() for s in (minmax_steps(w, 4), mse_steps(w, 4)))
        >>> bool(better < worse)
        True

    Args:
        w: a weight of any shape.
        bits: 2 to 8.
        axis: the dimension that has a step of its own for each index; None for one step.
        candidates: steps tried per channel, evenly spaced up to the one that covers the largest magnitude (`step_grid`).

    Returns:
        Positive float32 steps as `minmax_steps` gives them; never of larger error than those.
    """
    rows = _rows(w, axis)
    low, high = limits(bits, True)
    largest = _sane(rows.abs().amax(1) / high)
    fractions = step_grid(bits, candidates).to(rows)
    best = torch.empty_like(largest)
    per_block = max(1, _BLOCK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], per_block):
        x_CK = rows[start : start + per_block]
        s_C = largest[start : start + per_block]
        at_once = max(1, _BLOCK // max(1, x_CK.numel()))
        errors = []
        for group in fractions.split(at_once):
            s_FC1 = (group[:, None] * s_C)[:, :, None]
            q = torch.div(x_CK, s_FC1).round_().clamp_(low, high).mul_(s_FC1).sub_(x_CK)
            errors.append(torch.linalg.vector_norm(q, dim=2))
        best[start : start + per_block] = fractions[torch.cat(errors).argmin(0)] * s_C
    return _shaped(best, axis)


def step_grid(bits: int, candidates: int) -> Tensor:
    """The fractions of the covering step that `mse_steps` tries: from ``0.1 + 0.05 bits`` to 1, shape ``(candidates,)``."""
    return torch.linspace(1.0, 0.1 + 0.05 * bits, candidates)


def codes(w: Tensor, step: Tensor, bits: int, axis: int | None, *, signed: bool) -> Tensor:
    """Integer codes of a weight: int8 around 0, or uint8 around ``2^(bits-1)``.

    Example:
        >>> codes(torch.tensor([-1.0, 0.0, 0.5]), torch.tensor(0.5), 8, None, signed=False)
        tensor([126, 128, 129], dtype=torch.uint8)
    """
    low, high = limits(bits, True)
    q = (w / along(step, w, axis)).round_().clamp_(low, high)
    return q.to(torch.int8) if signed else q.add_(-low).to(torch.uint8)


def fake_quantize(w: Tensor, step: Tensor, bits: int, axis: int | None) -> Tensor:
    """A weight rounded to its grid, in float.

    Example:
        >>> fake_quantize(torch.tensor([0.2, 0.9]), torch.tensor(0.5), 8, None)
        tensor([0., 1.])
    """
    s = along(step, w, axis)
    return (w / s).round_().clamp_(*limits(bits, True)).mul_(s)


def _rows(w: Tensor, axis: int | None) -> Tensor:
    w = w.detach().to(torch.float32)
    return w.reshape(1, -1) if axis is None else w.movedim(axis, 0).flatten(1) if w.dim() > 1 else w.reshape(-1, 1)


def _shaped(steps: Tensor, axis: int | None) -> Tensor:
    return steps[0] if axis is None else steps


def _sane(steps: Tensor) -> Tensor:
    alive = steps > 1e-30
    stand_in = steps[alive].median() if bool(alive.any()) else steps.new_tensor(1.0)
    return torch.where(alive, steps, stand_in)
