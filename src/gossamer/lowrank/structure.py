"""Factorised layers as plain modules: which factors a method has, a Sequential of linear layers or convolutions for them, and its costs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import nn

from gossamer.errors import PlanError
from gossamer.exchange import Dims, Factor, Layer, dims, row, walk

METHODS = ("svd", "spatial_svd", "tucker2", "cp")
Ranks = tuple[int, ...]


def takes(method: str, d: Dims) -> bool:
    """Whether a method is defined for a layer: spatial SVD needs two kernel axes longer than 1, Tucker-2 and CP one."""
    return len(d.wide_axes) >= {"svd": 0, "spatial_svd": 2, "tucker2": 1, "cp": 1}[method]


def full_ranks(method: str, d: Dims) -> Ranks:
    """Ranks at which a method is exact for every weight: one, or two for Tucker-2 (of the inputs, of the outputs).

    Examples:
        >>> d = Dims(1, 64, 32, (3, 3))
        >>> [full_ranks(m, d) for m in METHODS]
        [(64,), (96,), (32, 64), (288,)]
    """
    if method == "svd":
        return (min(d.outs, d.ins * d.taps),)
    if method == "spatial_svd":
        first = d.kernel[d.wide_axes[0]]
        return (min(d.ins * first, d.outs * d.taps // first),)
    if method == "tucker2":
        return (d.ins, d.outs)
    sizes = (d.outs, d.ins, *(d.kernel[a] for a in d.wide_axes))
    return (prod(sizes) // max(sizes),)


def factors_of(method: str, d: Dims, ranks: Ranks) -> list[Factor]:
    """The layers of a factorised one, in the order in which they run.

    Examples:
        >>> [f.shape for f in factors_of("tucker2", Dims(1, 64, 32, (3, 3)), (8, 16))]
        [(1, 8, 32, 1, 1), (1, 16, 8, 3, 3), (1, 64, 16, 1, 1)]
    """

    def factor(groups: int, outs: int, ins: int, axes: Sequence[int]) -> Factor:
        return Factor(groups, outs, ins, tuple(axes), tuple(k if a in axes else 1 for a, k in enumerate(d.kernel)))

    every = range(len(d.kernel))
    if method == "svd":
        (r,) = ranks
        return [factor(d.groups, r, d.ins, every), factor(d.groups, d.outs, r, ())]
    if method == "spatial_svd":
        (r,) = ranks
        first = d.wide_axes[:1]
        return [factor(d.groups, r, d.ins, first), factor(d.groups, d.outs, r, [a for a in every if a not in first])]
    if method == "tucker2":
        a, b = ranks
        return [factor(d.groups, a, d.ins, ()), factor(d.groups, b, a, every), factor(d.groups, d.outs, b, ())]
    (r,) = ranks
    narrow = [a for a in every if a not in d.wide_axes]  # their stride and padding go with the first wide axis
    along = [sorted([a, *narrow] if i == 0 else [a]) for i, a in enumerate(d.wide_axes)]
    return [factor(d.groups, r, d.ins, ()), *(factor(d.groups * r, 1, 1, axes) for axes in along), factor(d.groups, d.outs, r, ())]


def check_ranks(method: str, d: Dims, ranks: Ranks, where: str) -> None:
    """PlanError where ranks do not fit a layer."""
    full = full_ranks(method, d) if method in METHODS and takes(method, d) else None
    if full is None:
        raise PlanError(f"{where} has a kernel of {d.kernel or 'no'} positions, which method {method!r} does not factorise")
    if len(ranks) != len(full) or any(not 1 <= r <= f for r, f in zip(ranks, full, strict=True)):
        raise PlanError(f"{where}: {method} takes ranks from 1 to {full}, not {ranks}")


def skeleton(layer: Layer, method: str, ranks: Ranks, *, bias: bool, device: Any = None) -> nn.Sequential:
    """The modules of a factorised layer, weights zero, in the layer's mode, dtype and (unless named) device.

    Examples:
        >>> skeleton(nn.Conv2d(4, 6, 3, stride=2, padding=1), "spatial_svd", (5,), bias=True)
        Sequential(
          (0): Conv2d(4, 5, kernel_size=(3, 1), stride=(2, 1), padding=(1, 0), bias=False)
          (1): Conv2d(5, 6, kernel_size=(1, 3), stride=(1, 2), padding=(0, 1))
        )
    """
    return row(layer, factors_of(method, dims(layer), ranks), bias=bias, device=device)


def positions(layer: Layer, method: str, shape: Sequence[int]) -> list[int]:
    """How often each factor's weight is used on an input of some shape: MACs are that times its elements, whatever the ranks.

    Examples:
        >>> positions(nn.Conv2d(4, 6, 3, stride=2, padding=1), "spatial_svd", (1, 4, 8, 8))
        [32, 16]
    """
    d = dims(layer)
    made = skeleton(layer, method, (1,) * len(full_ranks(method, d)), bias=False, device="meta")
    return [uses for _, uses in walk(made, shape)]
