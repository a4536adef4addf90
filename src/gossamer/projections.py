"""Exact projections on sets of sparse weights: at most k non-zeros, an L1 ball, N:M, blocks."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, prod
from typing import overload

import torch
from torch import Tensor

from gossamer.errors import UsageError

CHUNK = 2**16
"""Weights whose rows are projected together."""

__all__ = ["block_project", "l0_project", "l1_project", "largest", "nm_project"]


@overload
def l0_project(w: Tensor, k: int, *, dim: int | None = None) -> Tensor: ...
@overload
def l0_project(w: Sequence[Tensor], k: int, *, dim: None = None) -> list[Tensor]: ...
def l0_project(w: Tensor | Sequence[Tensor], k: int, *, dim: int | None = None) -> Tensor | list[Tensor]:
    """The nearest tensor (Frobenius norm) with at most `k` non-zeros: the k largest magnitudes stay.

    Examples:
        >>> l0_project(torch.tensor([1.0, -3.0, 2.0, 2.0]), 2)
        tensor([ 0., -3.,  2.,  0.])

    Args:
        w: weights of any shape; a sequence of tensors is projected as one vector.
        k: how many stay, 0 or more; of equal magnitudes the one with the lowest index stays.
        dim: project every slice along this dimension on its own (0: each output channel), with `k` for each.

    Returns:
        A new tensor, or a list of them for a sequence; `w` itself if it has no more than `k` entries, as a copy.

    Raises:
        UsageError: `k` is negative or not an integer, or the weights are not finite floating-point numbers.
    """
    _check_count("k", k)
    w_RN, shape = _rows("l0_project", w, dim)
    return shape.back(torch.where(largest(_magnitude(w_RN), k), w_RN, 0))


@overload
def l1_project(w: Tensor, radius: float, *, dim: int | None = None) -> Tensor: ...
@overload
def l1_project(w: Sequence[Tensor], radius: float, *, dim: None = None) -> list[Tensor]: ...
def l1_project(w: Tensor | Sequence[Tensor], radius: float, *, dim: int | None = None) -> Tensor | list[Tensor]:
    """The nearest tensor (Frobenius norm) whose magnitudes sum to at most `radius`: soft thresholding at an exact threshold.

    Examples:
        >>> l1_project(torch.tensor([3.0, -1.0, 0.5]), 2.0)
        tensor([2., -0., 0.])

    Args:
        w: weights of any shape; a sequence of tensors is projected as one vector.
        radius: of the L1 ball, 0 or more.
        dim: project every slice along this dimension on its own (0: each output channel), each with `radius`.

    Returns:
        A new tensor, or a list of them for a sequence; weights inside the ball come back unchanged.

    Raises:
        UsageError: `radius` is negative or not finite, or the weights are not finite floating-point numbers.

    Source: Duchi, Shalev-Shwartz, Singer and Chandra, "Efficient projections onto the l1-ball", ICML 2008; the threshold is found
    without a sort, as in Michelot, "A finite algorithm for finding the projection of a point onto the canonical simplex", 1986.
    """
    if isinstance(radius, bool) or not isinstance(radius, (int, float)) or not isfinite(radius) or radius < 0:
        raise UsageError(f"radius is {radius!r}; it is a finite number, 0 or more")
    w_RN, shape = _rows("l1_project", w, dim)
    if not w_RN.numel() or radius == 0:
        return shape.back(torch.zeros_like(w_RN))
    parts = w_RN.split(max(1, CHUNK // w_RN.shape[1]))  # rows that fit in a cache: they are read several times
    return shape.back(torch.cat([_shrunk(part, float(radius)) for part in parts]))


def nm_project(w: Tensor, n: int, m: int, *, dim: int = 1) -> Tensor:
    """The nearest tensor (Frobenius norm) with at most `n` non-zeros in every `m` consecutive entries along `dim`.

    Examples:
        >>> nm_project(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), 2, 4)
        tensor([[ 0., -3.,  2.,  0.]])

    Args:
        w: weights; the size of `dim` is a multiple of `m`.
        n: how many stay in each group, 0 or more.
        m: length of a group, 1 or more.
        dim: along which the groups lie (1: input channels).

    Returns:
        A new tensor.

    Raises:
        UsageError: sizes that do not fit, or weights that are not finite floating-point numbers.
    """
    _check_count("n", n)
    _check_count("m", m)
    _check_weights("nm_project", w)
    _check_dim("nm_project", w, dim)
    if m < 1 or w.shape[dim] % m:
        raise UsageError(f"nm_project: dimension {dim} has {w.shape[dim]} entries, not a multiple of m={m}")
    moved = w.detach().movedim(dim, -1)
    w_RM = moved.reshape(-1, m)
    kept_RM = torch.where(largest(_magnitude(w_RM), n), w_RM, 0)
    return kept_RM.reshape(moved.shape).movedim(-1, dim).contiguous()


def block_project(w: Tensor, k: int, block: tuple[int, int]) -> Tensor:
    """The nearest tensor (Frobenius norm) with at most `k` non-zero blocks of the matrix outputs x everything else.

    Examples:
        >>> block_project(torch.tensor([[1.0, 1.0, 0.0, 3.0]]), 1, (1, 2))
        tensor([[0., 0., 0., 3.]])

    Args:
        w: weights with two dimensions or more; those after the first are flattened to the columns of a matrix.
        k: how many blocks stay, 0 or more; of equal norms the first one, row by row.
        block: rows and columns of a block; they divide the matrix.

    Returns:
        A new tensor.

    Raises:
        UsageError: sizes that do not fit, or weights that are not finite floating-point numbers.
    """
    _check_count("k", k)
    _check_weights("block_project", w)
    rows, columns = (w.shape[0], prod(w.shape[1:])) if w.dim() > 1 else (0, 0)
    if w.dim() < 2 or min(block) < 1 or rows % block[0] or columns % block[1]:
        raise UsageError(f"block_project: blocks of {block[0]} x {block[1]} do not divide weights of shape {tuple(w.shape)}")
    b_YyXx = w.detach().reshape(rows // block[0], block[0], columns // block[1], block[1])
    energy_YX = b_YyXx.double().square().sum((1, 3))
    keep_YX = largest(energy_YX.reshape(1, -1), k).reshape(energy_YX.shape)
    return torch.where(keep_YX[:, None, :, None], b_YyXx, 0).reshape(w.shape)


def largest(a_RN: Tensor, k: int) -> Tensor:
    """Mask of the `k` largest of every row, the lowest index first among equals: selection, not a sort.

    Examples:
        >>> largest(torch.tensor([[3.0, 1.0, 3.0, 2.0]]), 2)
        tensor([[ True, False,  True, False]])

    Args:
        a_RN: rows of numbers.
        k: how many of each, 0 or more.
    """
    n = a_RN.shape[1]
    if k >= n:
        return torch.ones_like(a_RN, dtype=torch.bool)
    if k == 0:
        return torch.zeros_like(a_RN, dtype=torch.bool)
    kth_R1 = a_RN.kthvalue(n - k + 1, dim=1, keepdim=True).values
    above_RN, equal_RN = a_RN > kth_R1, a_RN == kth_R1
    room_R1 = k - above_RN.sum(1, keepdim=True)
    return above_RN | (equal_RN & (equal_RN.cumsum(1) <= room_R1))


def _shrunk(w_RN: Tensor, radius: float) -> Tensor:
    a_RN = _magnitude(w_RN)
    total_R1 = a_RN.sum(1, keepdim=True, dtype=torch.float64)
    theta_R1 = _threshold(a_RN, total_R1, radius)
    shrunk_RN = w_RN.sign() * (a_RN - theta_R1.to(a_RN.dtype)).clamp(min=0).to(w_RN.dtype)
    return torch.where(total_R1 <= radius, w_RN, shrunk_RN)


def _threshold(a_RN: Tensor, total_R1: Tensor, radius: float) -> Tensor:
    """Theta with sum(max(a - theta, 0)) = radius for every row: Newton's method from below, which only ever drops entries, so it ends."""
    count_R1 = torch.full_like(total_R1, a_RN.shape[1])
    theta_R1 = (total_R1 - radius) / count_R1
    if len(a_RN) == 1 and a_RN.shape[1] > 2 * CHUNK:  # begin near the end: a step from anywhere lands below theta, since the sum is convex
        few_RN = a_RN[:, :: len(a_RN[0]) // CHUNK]
        near_R1 = _threshold(few_RN, few_RN.sum(1, keepdim=True, dtype=torch.float64), radius * few_RN.shape[1] / a_RN.shape[1])
        above = a_RN[a_RN > near_R1.to(a_RN.dtype)]
        if len(above):
            theta_R1 = torch.maximum(theta_R1, (above.sum(dtype=torch.float64) - radius) / len(above))
    while True:
        active_RN = a_RN > theta_R1.to(a_RN.dtype)
        fewer_R1 = active_RN.sum(1, keepdim=True).double()
        if not (fewer_R1 < count_R1).any():
            return theta_R1
        sum_R1 = torch.where(active_RN, a_RN, 0).sum(1, keepdim=True, dtype=torch.float64)
        theta_R1 = torch.where((fewer_R1 > 0) & (fewer_R1 < count_R1), (sum_R1 - radius) / fewer_R1.clamp(min=1), theta_R1)
        count_R1 = torch.minimum(count_R1, fewer_R1)
        if len(a_RN) == 1 and 4 * int(fewer_R1) < a_RN.shape[1]:  # a copy pays only when it is much shorter
            a_RN = a_RN[active_RN][None]


def _magnitude(w_RN: Tensor) -> Tensor:
    return w_RN.abs() if w_RN.dtype in (torch.float32, torch.float64) else w_RN.abs().float()


class _Shape:
    """How rows were made, to turn them back."""

    def __init__(self, shapes: list[torch.Size], dim: int | None, single: bool) -> None:
        self.shapes, self.dim, self.single = shapes, dim, single

    def back(self, w_RN: Tensor) -> Tensor | list[Tensor]:
        if self.dim is not None:
            shape = list(self.shapes[0])
            moved = [shape.pop(self.dim), *shape]
            return w_RN.reshape(moved).movedim(0, self.dim).contiguous()
        parts = w_RN[0].split([s.numel() for s in self.shapes])
        out = [p.reshape(s).clone() for p, s in zip(parts, self.shapes, strict=True)]
        return out[0] if self.single else out


def _rows(what: str, w: Tensor | Sequence[Tensor], dim: int | None) -> tuple[Tensor, _Shape]:
    single = isinstance(w, Tensor)
    tensors: list[Tensor] = [w] if isinstance(w, Tensor) else list(w)
    if not tensors:
        raise UsageError(f"{what}: no tensors were given")
    for t in tensors:
        _check_weights(what, t)
    if len({(t.dtype, t.device) for t in tensors}) > 1:
        raise UsageError(f"{what}: tensors projected together share one dtype and device")
    shape = _Shape([t.shape for t in tensors], dim, single)
    if dim is None:
        return torch.cat([t.detach().reshape(-1) for t in tensors])[None], shape
    if not single:
        raise UsageError(f"{what}: dim goes with one tensor, not with a sequence")
    _check_dim(what, tensors[0], dim)
    moved = tensors[0].detach().movedim(dim, 0)
    return moved.reshape(len(moved), prod(moved.shape[1:])), shape


def _check_weights(what: str, w: Tensor) -> None:
    if not w.is_floating_point():
        raise UsageError(f"{what}: the weights are {w.dtype}; they are floating-point numbers")
    if w.numel() and not all(torch.isfinite(v) for v in torch.aminmax(w.detach())):
        raise UsageError(f"{what}: {int((~w.isfinite()).sum())} of {w.numel()} weights are NaN or infinite")


def _check_dim(what: str, w: Tensor, dim: int) -> None:
    if not -w.dim() <= dim < w.dim():
        raise UsageError(f"{what}: there is no dimension {dim} in weights of shape {tuple(w.shape)}")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(f"{name} is {value!r}; it is an integer, 0 or more")
