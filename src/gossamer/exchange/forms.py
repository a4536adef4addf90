"""Layers in a form that their stand-ins are computed in, and stand-ins as plain modules: a row of linear layers or convolutions.

Weights are handled in one form, ``(groups, outs, ins, *kernel)``; a transposed convolution is the convolution with its kernel turned round.
Letters: G groups, O outputs and I inputs of a group, K inputs times kernel positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

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

    Examples:
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


def row(layer: Layer, parts: Sequence[Factor], *, bias: bool, device: Any = None) -> nn.Sequential:
    """The modules of some factors in a row, weights zero, in the layer's mode, dtype and (unless named) device.

    Examples:
        >>> conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        >>> row(conv, [Factor(4, 2, 1, (0, 1), (3, 3)), Factor(1, 6, 8, (), (1, 1))], bias=True)
        Sequential(
          (0): Conv2d(4, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=4, bias=False)
          (1): Conv2d(8, 6, kernel_size=(1, 1), stride=(1, 1))
        )
    """
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
