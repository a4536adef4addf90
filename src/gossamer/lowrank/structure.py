"""Factorised layers as plain modules: which factors a method has, a Sequential of linear layers or convolutions for them, and its costs.

Weights are handled in one form, ``(groups, outs, ins, *kernel)``; a transposed convolution is the convolution with its kernel turned round.
Letters: G groups, O outputs and I inputs of a group, R rank, K inputs times kernel positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gossamer.errors import PlanError

METHODS = ("svd", "spatial_svd", "tucker2", "cp")
Ranks = tuple[int, ...]
Layer = nn.Linear | _ConvNd
_PLAIN: dict[int, type[_ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, type[_ConvNd]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@dataclass(frozen=True)
class Dims:
    """Sizes of a layer's weight: groups, outputs and inputs of a group, kernel (empty for a linear layer)."""

    groups: int
    outs: int
    ins: int
    kernel: tuple[int, ...]

    @property
    def wide_axes(self) -> tuple[int, ...]:
        """Kernel axes longer than 1."""
        return tuple(a for a, k in enumerate(self.kernel) if k > 1)

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return prod(self.kernel)


@dataclass(frozen=True)
class Factor:
    """One layer of a factorised one.

    Attributes:
        groups, outs, ins: of its weight, outputs and inputs of a group.
        axes: kernel axes of the original that it covers, with their stride, padding and dilation; none for a pointwise factor.
        kernel: of its weight.
    """

    groups: int
    outs: int
    ins: int
    axes: tuple[int, ...]
    kernel: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, ``(groups, outs, ins, *kernel)``."""
        return (self.groups, self.outs, self.ins, *self.kernel)


def dims(layer: Layer) -> Dims:
    """Sizes of a layer's weight.

    Example:
        >>> dims(nn.Conv2d(8, 6, (3, 1), groups=2))
        Dims(groups=2, outs=3, ins=4, kernel=(3, 1))
    """
    if isinstance(layer, nn.Linear):
        return Dims(1, layer.out_features, layer.in_features, ())
    return Dims(layer.groups, layer.out_channels // layer.groups, layer.in_channels // layer.groups, tuple(layer.kernel_size))


def canonical(layer: Layer) -> Tensor:
    """A layer's weight as ``(groups, outs, ins, *kernel)``, detached."""
    weight, d = layer.weight.detach(), dims(layer)
    if isinstance(layer, _ConvTransposeNd):
        turned = weight.reshape(d.groups, d.ins, d.outs, *d.kernel).transpose(1, 2)
        return turned.flip(tuple(range(3, turned.dim())))
    return weight.reshape(d.groups, d.outs, d.ins, *d.kernel)


def put(layer: Layer, weight_GOIk: Tensor) -> None:
    """Fill a layer's weight in place from the form that `canonical` gives."""
    if isinstance(layer, _ConvTransposeNd):
        weight_GOIk = weight_GOIk.flip(tuple(range(3, weight_GOIk.dim()))).transpose(1, 2)
    with torch.no_grad():
        layer.weight.copy_(weight_GOIk.reshape(layer.weight.shape))


def takes(method: str, d: Dims) -> bool:
    """Whether a method is defined for a layer: spatial SVD needs two kernel axes longer than 1, Tucker-2 and CP one."""
    return len(d.wide_axes) >= {"svd": 0, "spatial_svd": 2, "tucker2": 1, "cp": 1}[method]


def full_ranks(method: str, d: Dims) -> Ranks:
    """Ranks at which a method is exact for every weight: one, or two for Tucker-2 (of the inputs, of the outputs).

    Example:
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

    Example:
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

    Example:
        >>> skeleton(nn.Conv2d(4, 6, 3, stride=2, padding=1), "spatial_svd", (5,), bias=True)
        Sequential(
          (0): Conv2d(4, 5, kernel_size=(3, 1), stride=(2, 1), padding=(1, 0), bias=False)
          (1): Conv2d(5, 6, kernel_size=(1, 3), stride=(1, 2), padding=(0, 1))
        )
    """
    parts = factors_of(method, dims(layer), ranks)
    made = [_module(layer, f, bias and f is parts[-1]) for f in parts]
    out = nn.Sequential(*made).to(dtype=layer.weight.dtype).to_empty(device=layer.weight.device if device is None else device)
    with torch.no_grad():
        for p in out.parameters():
            p.zero_()
    for p in out.parameters():
        p.requires_grad_(layer.weight.requires_grad)
    return out.train(layer.training)


def _module(layer: Layer, f: Factor, bias: bool) -> Layer:
    ins, outs = f.groups * f.ins, f.groups * f.outs
    if isinstance(layer, nn.Linear):
        return nn.Linear(ins, outs, bias=bias, device="meta")
    space = len(f.kernel)

    def along(values: Any, other: int) -> tuple[int, ...]:
        return tuple(v if a in f.axes else other for a, v in enumerate(values))

    options: dict[str, Any] = {"groups": f.groups, "bias": bias, "device": "meta"}
    if not f.axes:
        return _PLAIN[space](ins, outs, f.kernel, **options)
    padding: Any = layer.padding
    options |= {
        "stride": along(layer.stride, 1),
        "padding": padding if isinstance(padding, str) else along(padding, 0),
        "dilation": along(layer.dilation, 1),
        "padding_mode": layer.padding_mode,
    }
    if isinstance(layer, _ConvTransposeNd):
        return _TRANSPOSED[space](ins, outs, f.kernel, output_padding=along(layer.output_padding, 0), **options)
    return _PLAIN[space](ins, outs, f.kernel, **options)


def positions(layer: Layer, method: str, shape: Sequence[int]) -> list[int]:
    """How often each factor's weight is used on an input of some shape: MACs are that times its elements, whatever the ranks.

    Example:
        >>> positions(nn.Conv2d(4, 6, 3, stride=2, padding=1), "spatial_svd", (1, 4, 8, 8))
        [32, 16]
    """
    d = dims(layer)
    made = skeleton(layer, method, (1,) * len(full_ranks(method, d)), bias=False, device="meta")
    return [uses for _, uses in walk(made, shape)]


def bare(layer: Layer) -> Layer:
    """A twin of a layer without values."""
    d = dims(layer)
    return _module(layer, Factor(d.groups, d.outs, d.ins, tuple(range(len(d.kernel))), d.kernel), layer.bias is not None).to(
        layer.weight.dtype
    )


def walk(layers: Iterable[nn.Module], shape: Sequence[int]) -> list[tuple[tuple[int, ...], int]]:
    """For layers without values, in a row: the shape of each one's input, and how often its weight is used."""
    x = torch.empty(tuple(shape), device="meta")
    out = []
    for layer in layers:
        assert isinstance(layer, Layer)
        y = layer(x.to(layer.weight.dtype))
        meets = x if isinstance(layer, _ConvTransposeNd) else y  # transposed: every input position meets the whole kernel
        channels = meets.shape[-1] if isinstance(layer, nn.Linear) else meets.shape[-len(layer.kernel_size) - 1]
        out.append((tuple(x.shape), meets.numel() // channels))
        x = y
    return out
