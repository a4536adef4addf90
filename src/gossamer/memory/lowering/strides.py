"""Strides of the tensors that steps write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def contiguous(shape: Any) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return torch.empty(tuple(shape), device="meta").stride()


def channels_last_strides(shape: Any) -> tuple[int, ...]:
    """Strides of a channels-last tensor of 3, 4 or 5 dimensions."""
    _, c, *space = shape
    stride, step = [0] * len(space), c
    for d in reversed(range(len(space))):
        stride[d], step = step, step * space[d]
    return (step, 1, *stride)


def channels_last(x: Tensor) -> bool:
    """Whether a tensor is dense and channels-last."""
    return x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides without gaps, dimensions in memory in the tensor's order (the last innermost where strides say nothing)."""
    old = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-old[d] if tensor.shape[d] > 1 else 0, d))
    moving = [d for d in order if tensor.shape[d] > 1 and old[d] > 0]
    if len(moving) != sum(n > 1 for n in tensor.shape):  # expanded
        return contiguous(tensor.shape)
    channels_last = tensor.dim() in (4, 5) and _is_channels_last(tensor)
    if channels_last:
        return channels_last_strides(tensor.shape)
    stride, step = [0] * tensor.dim(), 1
    for d in reversed(moving):
        stride[d], step = step, step * tensor.shape[d]
    plain = contiguous(tensor.shape)
    if moving == [d for d in range(tensor.dim()) if tensor.shape[d] > 1]:
        return plain
    return tuple(s if tensor.shape[d] > 1 else max(1, step) for d, s in enumerate(stride))


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether the channels are innermost, gaps between pixels or not; a tensor of one pixel counts."""
    c, stride = tensor.shape[1], tensor.stride()
    if c > 1 and stride[1] != 1:
        return False
    outer = [stride[d] for d in range(2, tensor.dim()) if tensor.shape[d] > 1]
    return outer == sorted(outer, reverse=True) and all(s >= c for s in outer) and (bool(outer) or c > 1)


def image_strides(x: Tensor, shape: Any) -> tuple[int, ...]:
    """Channels-last where the tensor is, contiguous otherwise."""
    return channels_last_strides(shape) if dense_strides(x) == channels_last_strides(x.shape) else contiguous(shape)


def is_dense(x: Tensor) -> bool:
    """Whether a tensor has no gaps and its dimensions lie in an order that kernels take."""
    return dense_strides(x) == x.stride() or x.is_contiguous() or (x.dim() == 4 and channels_last(x))
