"""Steps of a weight: the largest value, or the least squared error over a grid. W is (channels, elements of one channel)."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import UsageError
from gossamer.quantization.ops import along, limits

_BLOCK = 1 << 18  # elements of one work buffer: small enough for a processor's cache


def minmax_steps(w: Tensor, bits: int = 8, axis: int | None = 0, *, group: int | None = None) -> Tensor:
    """Step per channel that covers the largest magnitude: ``max|w| / (2^(bits-1) - 1)``.

    Examples:
        >>> minmax_steps(torch.tensor([[1.0, -127.0], [0.0, 0.0]]))
        tensor([1., 1.])

    Args:
        w: a weight of any shape.
        bits: 2 to 8.
        axis: the dimension that has a step of its own for each index; None for one step.
        group: entries of a channel, in order, that share a step; None for the whole channel.

    Returns:
        Positive float32 steps, shape ``(w.shape[axis],)``, ``(w.shape[axis], entries / group)`` with groups, or ``()``. A channel of zeros
        gets the median of the others' steps (1 where all are zero): any step stores it exactly, and a tiny one would overflow what is
        multiplied by it.

    Raises:
        UsageError: ``group`` does not divide the entries of a channel.
    """
    rows, shape = _rows(w, axis, group)
    return _sane(rows.abs().amax(1) / limits(bits, True)[1]).reshape(shape)


def mse_steps(
    w: Tensor, bits: int = 8, axis: int | None = 0, *, candidates: int = 200, group: int | None = None, importance: Tensor | None = None
) -> Tensor:
    """Step per channel of least squared rounding error, by grid search: ``argmin_S sum (w - clamp(round(w / S)) S)^2``.

    Examples:
        >>> w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
        >>> worse, better = (fake_quantize(w, s, 4, 0).sub(w).square().mean() for s in (minmax_steps(w, 4), mse_steps(w, 4)))
        >>> bool(better < worse)
        True

    Args:
        w: a weight of any shape.
        bits: 2 to 8.
        axis: the dimension that has a step of its own for each index; None for one step.
        candidates: steps tried per channel, evenly spaced up to the one that covers the largest magnitude (`step_grid`).
        group: entries of a channel, in order, that share a step; None for the whole channel.
        importance: what each squared error counts, 0 or more, broadcastable to ``w``: the second moment of the input, for example.

    Returns:
        Positive float32 steps as `minmax_steps` gives them; never of larger error than those.

    Raises:
        UsageError: ``group`` does not divide the entries of a channel.
    """
    rows, shape = _rows(w, axis, group)
    low, high = limits(bits, True)
    largest = _sane(rows.abs().amax(1) / high)
    fractions = step_grid(bits, candidates).to(rows)
    root = None if importance is None else _rows(importance.detach().sqrt().expand_as(w), axis, group)[0]
    best = torch.empty_like(largest)
    per_block = max(1, _BLOCK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], per_block):
        x_CK = rows[start : start + per_block]
        s_C = largest[start : start + per_block]
        at_once = max(1, _BLOCK // max(1, x_CK.numel()))
        errors = []
        for tried in fractions.split(at_once):
            s_FC1 = (tried[:, None] * s_C)[:, :, None]
            q = torch.div(x_CK, s_FC1).round_().clamp_(low, high).mul_(s_FC1).sub_(x_CK)
            if root is not None:
                q.mul_(root[start : start + per_block])
            errors.append(torch.linalg.vector_norm(q, dim=2))
        best[start : start + per_block] = fractions[torch.cat(errors).argmin(0)] * s_C
    return best.reshape(shape)


def affine_steps(
    w: Tensor, bits: int = 8, axis: int | None = 0, *, candidates: int = 64, group: int | None = None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Step and zero point per channel of least squared rounding error, for codes from 0 to ``2^bits - 1``, by grid search over both ends.

    Examples:
        >>> w = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) + 0.5
        >>> step, zero = affine_steps(w, 4)
        >>> asymmetric = ((w / step[:, None]).round() + zero[:, None]).clamp(0, 15).sub(zero[:, None]).mul(step[:, None])
        >>> bool((asymmetric - w).square().mean() < (fake_quantize(w, mse_steps(w, 4), 4, 0) - w).square().mean())
        True

    Args:
        w: a weight of any shape.
        bits: 2 to 8.
        axis: the dimension that has a step of its own for each index; None for one step.
        candidates: positions tried of both ends together, then of each alone; 1 covers the smallest and the largest value.
        group: entries of a channel, in order, that share a step; None for the whole channel.
        importance: what each squared error counts, as in `mse_steps`.

    Returns:
        Positive float32 steps and zero points (int64, 0 to ``2^bits - 1``), shaped as `minmax_steps` shapes them; 0 is represented exactly.

    Raises:
        UsageError: ``group`` does not divide the entries of a channel.
    """
    rows, shape = _rows(w, axis, group)
    root = None if importance is None else _rows(importance.detach().sqrt().expand_as(w), axis, group)[0]
    levels = (1 << bits) - 1
    low_C, high_C = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    fractions = torch.linspace(1.0, 0.1 + 0.05 * bits, candidates).to(rows)
    for moved in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0)) if candidates > 1 else ():
        least = torch.full_like(low_C, torch.inf)
        best = torch.stack([low_C, high_C])
        for f in fractions:
            ends = torch.stack([low_C, high_C]) * (1 - torch.tensor(moved).to(rows)[:, None] * (1 - f))
            step, zero = _affine(ends, levels)
            q = (
                torch.div(rows, step[:, None])
                .round_()
                .add_(zero[:, None])
                .clamp_(0, levels)
                .sub_(zero[:, None])
                .mul_(step[:, None])
                .sub_(rows)
            )
            error = torch.linalg.vector_norm(q if root is None else q.mul_(root), dim=1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, ends, best)
        low_C, high_C = best
    step, zero = _affine(torch.stack([low_C, high_C]), levels)
    return step.reshape(shape), zero.long().reshape(shape)


def step_grid(bits: int, candidates: int) -> Tensor:
    """The fractions of the covering step that `mse_steps` tries: from ``0.1 + 0.05 bits`` to 1, shape ``(candidates,)``."""
    return torch.linspace(1.0, 0.1 + 0.05 * bits, candidates)


def _affine(ends: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Step and zero point that cover an interval; rounding the zero point does not cut off the end that it moved away from."""
    low_C, high_C = ends
    step = (high_C - low_C) / levels
    step = torch.where(step > 1e-30, step, 1.0)
    zero = (-low_C / step).round().clamp(0, levels)
    for end, room in ((-low_C, zero), (high_C, levels - zero)):
        step = torch.where((room > 0) & (end > 0), torch.maximum(step, end / room.clamp(min=1)), step)
    return step, zero


def codes(w: Tensor, step: Tensor, bits: int, axis: int | None, *, signed: bool) -> Tensor:
    """Integer codes of a weight: int8 around 0, or uint8 around ``2^(bits-1)``.

    Examples:
        >>> codes(torch.tensor([-1.0, 0.0, 0.5]), torch.tensor(0.5), 8, None, signed=False)
        tensor([126, 128, 129], dtype=torch.uint8)
    """
    low, high = limits(bits, True)
    q = (w / along(step, w, axis)).round_().clamp_(low, high)
    return q.to(torch.int8) if signed else q.add_(-low).to(torch.uint8)


def fake_quantize(w: Tensor, step: Tensor, bits: int, axis: int | None) -> Tensor:
    """A weight rounded to its grid, in float.

    Examples:
        >>> fake_quantize(torch.tensor([0.2, 0.9]), torch.tensor(0.5), 8, None)
        tensor([0., 1.])
    """
    s = along(step, w, axis)
    return (w / s).round_().clamp_(*limits(bits, True)).mul_(s)


def _rows(w: Tensor, axis: int | None, group: int | None) -> tuple[Tensor, tuple[int, ...]]:
    """Entries that share a step as rows, and the shape of the steps."""
    w = w.detach().to(torch.float32)
    rows = w.reshape(1, -1) if axis is None else w.movedim(axis, 0).flatten(1) if w.dim() > 1 else w.reshape(-1, 1)
    if group is None:
        return rows, () if axis is None else (rows.shape[0],)
    if group < 1 or rows.shape[1] % group:
        raise UsageError(f"group={group} does not divide the {rows.shape[1]} entries of a channel")
    parts = rows.shape[1] // group
    return rows.reshape(-1, group), (parts,) if axis is None else (rows.shape[0], parts)


def _sane(steps: Tensor) -> Tensor:
    alive = steps > 1e-30
    stand_in = steps[alive].median() if bool(alive.any()) else steps.new_tensor(1.0)
    return torch.where(alive, steps, stand_in)
