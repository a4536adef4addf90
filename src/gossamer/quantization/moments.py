"""How a layer reads its input: what it multiplies its weights with, at all positions of its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from gossamer.quantization.graph import CONVOLUTION, LINEAR, op_name

_MOST = 1 << 25  # elements of unfolded input looked at for one layer
_AT_ONCE = 1 << 24
_LEAST_SAMPLES = 8


@dataclass(frozen=True)
class Geometry:
    """How a layer reads its input: groups, outputs of a group, inputs of one output, and the convolution's numbers."""

    groups: int
    outputs: int
    inputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def rows(self, w: Tensor) -> Tensor:
        """A weight as (groups, outputs, inputs)."""
        return w.reshape(self.groups, self.outputs, self.inputs)

    def columns(self, x: Tensor) -> Tensor:
        """An input as (groups, inputs, positions of all samples)."""
        if not self.kernel:
            return x.reshape(-1, self.inputs).T[None]
        if len(self.kernel) == 1:
            x = x[:, :, None]
        one = lambda t, fill: (fill,) * (2 - len(t)) + t  # noqa: E731
        kernel, stride, padding, dilation = one(self.kernel, 1), one(self.stride, 1), one(self.padding, 0), one(self.dilation, 1)
        if kernel == (1, 1) and padding == (0, 0):
            seen = x[:, :, :: stride[0], :: stride[1]].flatten(2)
        else:
            seen = F.unfold(x, kernel, dilation, padding, stride)
        return seen.unflatten(1, (self.groups, self.inputs)).permute(1, 2, 0, 3).flatten(2)

    def outputs_of(self, y: Tensor) -> Tensor:
        """An output as (groups, outputs, positions of all samples)."""
        if not self.kernel:
            return y.reshape(-1, self.outputs).T[None]
        return y.flatten(2).unflatten(1, (self.groups, self.outputs)).permute(1, 2, 0, 3).flatten(2)

    def at_once(self, x: Tensor) -> int:
        """Samples whose columns are looked at together, 1 or more."""
        return max(1, _AT_ONCE // max(1, self.groups * self.inputs * self.positions(x.shape)))

    def positions(self, shape: torch.Size) -> int:
        """About how many positions one sample has."""
        size = 1
        for n, s in zip(shape[2:], self.stride, strict=False):
            size *= -(-n // s)
        return size if self.kernel else max(1, shape[1:-1].numel())


def geometry(layer: fx.Node, w: Tensor) -> Geometry | None:
    """Of a convolution in one or two dimensions or a linear layer; None for anything else."""
    if op_name(layer) in LINEAR:
        return Geometry(1, w.shape[0], w.shape[1], (), (), (), ())
    if op_name(layer) not in CONVOLUTION or w.dim() > 4:
        return None
    given: list[Any] = [*layer.args[3:], *[None] * 4]
    n = w.dim() - 2

    def numbers(value: Any, fill: int) -> tuple[int, ...]:
        value = [fill] * n if value is None else list(value) if isinstance(value, list | tuple) else [value]
        return tuple(value * n if len(value) == 1 else value)

    if isinstance(given[1], str) or layer.kwargs:
        return None
    groups = int(given[3] or 1)
    return Geometry(
        groups, w.shape[0] // groups, w[0].numel(), tuple(w.shape[2:]), numbers(given[0], 1), numbers(given[1], 0), numbers(given[2], 1)
    )


def chosen_samples(shape: Geometry, x: Tensor, pieces: int = 1) -> Tensor:
    """Indices of the samples of an input that are looked at: all, or evenly chosen ones where there are very many positions. One of so many pieces alike."""
    per_sample = shape.groups * shape.inputs * shape.positions(x.shape)
    samples = x.shape[0] if x.dim() > 1 else 1
    used = max(min(samples, -(-_LEAST_SAMPLES // pieces)), min(samples, _MOST // pieces // max(1, per_sample)))
    return torch.linspace(0, samples - 1, used).round().long().unique()
