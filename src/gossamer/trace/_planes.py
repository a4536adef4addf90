"""Label planes: arithmetic on compressed label tensors.

A plane is an int64 tensor with as many dimensions as the tensor it belongs to. A dimension along which labels are constant has size 1,
so a plane of a feature map ``(N, C, H, W)`` has shape ``(1, C, 1, 1)`` and costs C integers. A tensor has one plane for each
independent set of channels: an activation mostly one, a weight one for its outputs and one for its inputs, a mask none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.trace._ledger import Ledger

Planes = tuple[Tensor, ...]
Size = Sequence[int]


@dataclass(frozen=True)
class Operand:
    """A tensor as rules see it: its shape, its planes, what it is where it has none, and whether it is (computed from) parameters alone."""

    shape: tuple[int, ...]
    planes: Planes
    what: str = "an unlabelled tensor"
    weight: bool = False


def varies(plane: Tensor) -> list[int]:
    """Dimensions along which labels differ."""
    return [d for d, n in enumerate(plane.shape) if n > 1]


def compress(full: Tensor) -> Tensor:
    """Narrow every dimension of stride 0 to size 1."""
    if 0 in full.stride():
        size = [1 if s == 0 else n for n, s in zip(full.shape, full.stride(), strict=True)]
        return full.as_strided(size, full.stride(), full.storage_offset())
    return full


def compress_by_value(full: Tensor, dims: Sequence[int]) -> Tensor:
    """Narrow those of ``dims`` along which all labels are equal."""
    for d in dims:
        if full.shape[d] > 1 and bool((full == full.narrow(d, 0, 1)).all()):
            full = full.narrow(d, 0, 1)
    return full


def move(operation: Callable[[Tensor], Tensor], plane: Tensor, shape: Size) -> Tensor:
    """Run a view operation on the whole label tensor and compress the result."""
    return compress(operation(plane.expand(shape)))


def lift(plane: Tensor, ndim: int) -> Tensor:
    """A plane with leading dimensions added, as broadcasting does."""
    return plane.reshape((1,) * (ndim - plane.dim()) + tuple(plane.shape)) if plane.dim() < ndim else plane


def reshape(plane: Tensor, old: Size, new: Size) -> Tensor:
    """Reshape a plane without expanding the dimensions that carry no labels.

    Both shapes are cut, from the left, wherever their products agree; only the cuts that carry labels are expanded.
    """
    wide: list[int] = []
    out: list[int] = []
    split: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0, a, b = i, j, 1, 1
        if i < len(old):
            a, i = old[i], i + 1
        if j < len(new):
            b, j = new[j], j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        labelled = any(n > 1 for n in plane.shape[i0:i])
        wide += old[i0:i] if labelled else [1] * (i - i0)
        if labelled and sum(n > 1 for n in new[j0:j]) > 1:
            split += range(j0, j)
        out += new[j0:j] if labelled else [1] * (j - j0)
    return compress_by_value(plane.expand(wide).reshape(out), split)


def join(ledger: Ledger, operands: Sequence[Operand], ndim: int, where: Callable[[], str]) -> Planes:
    """Broadcast operands against each other: labels that meet belong together; what meets an unlabelled size must stay.

    Where one side varies along more dimensions than the other (heads by positions, against something that all heads share), whole rows can
    still leave: positions are coupled within each row, and what the rows share stays.

    Args:
        ledger: where it is written down.
        operands: at least one.
        ndim: dimensions of the result.
        where: names the operation, for reasons.

    Returns:
        The planes of the result.
    """
    shapes = [(1,) * (ndim - len(o.shape)) + tuple(o.shape) for o in operands]
    planes = [[lift(p, ndim) for p in o.planes] for o in operands]
    result: list[tuple[Tensor, bool]] = []
    for i, mine in enumerate(planes):
        for plane in mine:
            merged, weight = plane, operands[i].weight
            for j, other in enumerate(operands):
                if j == i:
                    continue
                dims = varies(merged)
                sized = [d for d in dims if shapes[j][d] > 1 and not any(q.shape[d] > 1 for q in planes[j])]
                if sized and len(sized) < len(dims):
                    merged = collapse(ledger, merged, sized, where)
                elif sized:
                    ledger.freeze(merged, lambda other=other: f"meets {other.what} in {where()}")  # type: ignore[misc]
            rest = []
            for known, known_weight in result:
                if any(known.shape[d] > 1 for d in varies(merged)):
                    merged, weight = _meet(ledger, known, known_weight, merged, weight, where)
                else:
                    rest.append((known, known_weight))
            result = [*rest, (merged, weight)]
    return tuple(plane for plane, _ in result)


def _meet(ledger: Ledger, a: Tensor, a_weight: bool, b: Tensor, b_weight: bool, where: Callable[[], str]) -> tuple[Tensor, bool]:
    """Two planes that vary along a common dimension, as one."""
    dims_a, dims_b = set(varies(a)), set(varies(b))
    for small, large, weight, rows in ((a, b, a_weight, dims_b - dims_a), (b, a, b_weight, dims_a - dims_b)):
        if weight and rows and set(varies(small)) < set(varies(large)) and not ledger.columns:
            ledger.freeze(small, lambda: f"shared by what {where()} spreads it over")
            return collapse(ledger, large, varies(small), where), a_weight and b_weight
    ledger.unify(a, b, where)
    return cover(a, b), a_weight and b_weight


def cover(a: Tensor, b: Tensor) -> Tensor:
    """Labels of ``a``, stretched over the dimensions of either, or those of ``b`` where only they stretch that far."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return a if a.shape == shape else b if b.shape == shape else a.expand(shape)


def collapse(ledger: Ledger, plane: Tensor, dims: Sequence[int], where: Callable[[], str]) -> Tensor:
    """Couple all labels along ``dims`` and keep the first."""
    for d in dims:
        if plane.shape[d] > 1:
            first = plane.narrow(d, 0, 1)
            ledger.unify(first, plane.narrow(d, 1, plane.shape[d] - 1), where)
            plane = first
    return plane
