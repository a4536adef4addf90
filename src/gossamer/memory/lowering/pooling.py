"""Rules of pooling, reductions and resampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.memory.lowering.contractions import copied, spread
from gossamer.memory.lowering.strides import channels_last, channels_last_strides, dense_strides, image_strides

if TYPE_CHECKING:
    from gossamer.memory.lowering.recording import Recorder


def max_pool(r: Recorder, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False) -> Any:
    """Maximum pooling of images."""
    if x.dim() != 4 or x.dtype != torch.float32:
        return NotImplemented
    kernel, padding, dilation = spread(kernel, 2), spread(padding, 2), spread(dilation, 2)
    stride = spread(stride, 2) if stride else kernel
    shape = torch.ops.aten.max_pool2d_with_indices(bare(x), kernel, stride, padding, dilation, ceil_mode)[0].shape
    out = r.allocate(shape, image_strides(x, shape), x.dtype)
    r.emit("max_pool", (x,), (out,), kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    return out


def bare(x: Any) -> Any:
    """A tensor of the same geometry outside the recorder."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


def avg_pool(
    r: Recorder, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True, divisor: Any = None
) -> Any:  # fmt: skip
    """Average pooling of images."""
    if x.dim() != 4 or x.dtype != torch.float32:
        return NotImplemented
    kernel, padding = spread(kernel, 2), spread(padding, 2)
    stride = spread(stride, 2) if stride else kernel
    shape = torch.ops.aten.avg_pool2d(bare(x), kernel, stride, padding, ceil_mode, count_include_pad, divisor).shape
    x = dense(r, x)
    out = r.allocate(shape, image_strides(x, shape), x.dtype)
    r.emit("avg_pool", (x,), (out,), args=(kernel, stride, padding, ceil_mode, count_include_pad, divisor))
    return out


def dense(r: Recorder, x: Tensor) -> Tensor:
    """The tensor, or a copy without gaps."""
    stride = dense_strides(x)
    return x if stride == x.stride() or x.is_contiguous() or (x.dim() == 4 and channels_last(x)) else copied(r, x, stride)


def adaptive_avg_pool(r: Recorder, x: Any, size: Any) -> Any:
    """Adaptive average pooling, where the size divides the image."""
    if x.dim() != 4 or x.dtype != torch.float32:
        return NotImplemented
    size = [n if s is None else int(s) for s, n in zip(spread(size, 2), x.shape[2:], strict=True)]
    if size == list(x.shape[2:]):
        return x
    if size == [1, 1]:
        return _reduction(r, "mean", x, [2, 3], True)
    if any(n % s for n, s in zip(x.shape[2:], size, strict=True)):
        return NotImplemented
    kernel = [n // s for n, s in zip(x.shape[2:], size, strict=True)]
    return avg_pool(r, x, kernel)


def _reduction(r: Recorder, name: str, x: Any, dims: Any, keepdim: bool = False) -> Any:
    """A reduction over dimensions (None: all)."""
    dims = [dims] if isinstance(dims, int) else list(dims or range(x.dim()))
    dims = sorted(d % x.dim() for d in dims) if dims else list(range(x.dim()))
    if x.dtype != torch.float32:
        return NotImplemented
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)] if keepdim else [n for d, n in enumerate(x.shape) if d not in dims]
    out = r.allocate(shape, torch.empty(shape, device="meta").stride(), x.dtype)
    r.emit("reduce", (x,), (out,), op=name, dims=dims, keepdim=keepdim)
    return out


def reduced(name: str) -> Callable[..., Any]:
    """The rule of a reduction of that name."""

    def rule(r: Recorder, x: Any, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        return NotImplemented if dtype not in (None, torch.float32) else _reduction(r, name, x, dims, keepdim)

    return rule


def vector_norm(r: Recorder, x: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """The Euclidean norm over dimensions."""
    return NotImplemented if ord != 2 or dim is None or dtype is not None else _reduction(r, "vector_norm", x, dim, keepdim)


def softmax(r: Recorder, x: Any, dim: int, half: bool = False) -> Any:
    """A softmax; in place only along rows that are contiguous."""
    if x.dtype != torch.float32 or half:
        return NotImplemented
    x = dense(r, x)
    out = r.like(x)
    last = dim % x.dim() == x.dim() - 1 and x.stride(-1) == 1
    r.emit("softmax", (x,), (out,), into=(0,) if last else (), dim=dim)
    return out


def upsample(name: str) -> Callable[..., Any]:
    """The rule of a resampling of that name."""

    def rule(r: Recorder, x: Any, size: Any, *rest: Any) -> Any:
        if x.dim() != 4 or x.dtype != torch.float32:
            return NotImplemented
        x = x if channels_last(x) else copied(r, x, channels_last_strides(x.shape))  # on others the kernel allocates
        shape = (*x.shape[:2], *(int(s) for s in size))
        out = r.allocate(shape, channels_last_strides(shape), x.dtype)
        r.emit("upsample", (x,), (out,), op=name, args=([int(s) for s in size], *rest))
        return out

    return rule
