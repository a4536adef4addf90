"""What builders of kernels share: the type of a call, scratch cut into tensors, activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.memory.kernels.pointwise import POINTWISE, same_place

Call = Callable[[], Any]


def carve(scratch: Tensor | None, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Contiguous tensors that follow each other in scratch."""
    assert scratch is not None
    found, start = [], 0
    for shape in shapes:
        size = torch.Size(shape).numel() * dtype.itemsize
        found.append(scratch[start : start + size].view(dtype).view(*shape))
        start += -(-size // 64) * 64
    return found


def room(*counts: int, itemsize: int = 4) -> int:
    """Bytes of scratch that `carve` needs for tensors of so many elements."""
    return sum(-(-n * itemsize // 64) * 64 for n in counts)


def activation(act: Any, source: Tensor, out: Tensor) -> list[Call]:
    """An activation from one place to another (or where it lies); a plain copy where there is none."""
    if act is None:
        return [] if same_place(out, source) else [lambda: out.copy_(source)]
    name, args, kwargs = act
    run = POINTWISE[name]
    return [lambda: run(out, source, *args, **kwargs)]
