"""What one output of a layer is computed from: rows of a linear layer, patches of a convolution, of any geometry."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

POSITIONS = 2048
"""Most positions of a batch that a layer is measured on, drawn with a fixed seed."""


def patches(module: nn.Linear | _ConvNd, x: Tensor) -> Tensor:
    """What one output of a layer is computed from: ``(positions, groups, K)``, at most `POSITIONS` of them.

    K runs over input channels, then kernel positions. A transposed convolution is taken as the convolution that it is over its input with zeros
    between the pixels; its kernel then runs backwards.

    Examples:
        >>> conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        >>> patches(conv, torch.zeros(2, 4, 8, 8)).shape
        torch.Size([32, 2, 18])
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, 1, x.shape[-1])
        if len(rows) > POSITIONS:
            rows = rows[torch.randperm(len(rows), generator=generator)[:POSITIONS].to(x.device)]
        return rows.float()
    spatial = len(module.kernel_size)
    x = x if x.dim() == spatial + 2 else x[None]
    stride = module.stride
    if isinstance(module, _ConvTransposeNd):
        x, stride = _spread_out(module, x), (1,) * spatial
    elif any(module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], module.kernel_size, stride, module.dilation, strict=True)]
    total = x.shape[0] * prod(sizes)
    drawn = torch.randperm(total, generator=generator)[:POSITIONS] if total > POSITIONS else torch.arange(total)
    index: list[Tensor] = []
    for axis in reversed(range(spatial)):
        at = drawn % sizes[axis]
        drawn = drawn // sizes[axis]
        offsets = torch.arange(module.kernel_size[axis]) * module.dilation[axis]
        shape = [1] * (spatial + 1)
        shape[axis + 1] = -1
        index.insert(0, (at * stride[axis]).reshape(-1, *(1,) * spatial) + offsets.reshape(shape))
    samples = drawn.reshape(-1, *(1,) * spatial)
    got = x.movedim(1, -1)[(samples.to(x.device), *(i.to(x.device) for i in index))]  # (P, k.., C)
    return got.movedim(-1, 1).reshape(len(got), module.groups, -1).float()


def _spread_out(module: _ConvTransposeNd, x: Tensor) -> Tensor:
    """The input of a transposed convolution with zeros between the pixels and around them: a plain convolution over it gives the output."""
    wide = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)))
    every: Any = (..., *(slice(None, None, s) for s in module.stride))
    wide[every] = x
    padding: Any = module.padding
    around: list[int] = []
    for k, d, p, more in zip(module.kernel_size, module.dilation, padding, module.output_padding, strict=True):
        around = [d * (k - 1) - p, d * (k - 1) - p + more, *around]
    return F.pad(wide, around)
