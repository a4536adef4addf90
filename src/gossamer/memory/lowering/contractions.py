"""Rules of convolutions, matrix products and attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.memory.lowering.strides import channels_last, channels_last_strides

if TYPE_CHECKING:
    from gossamer.memory.lowering.recording import Recorder


def copied(r: Recorder, x: Tensor, stride: Any) -> Tensor:
    """A copy with other strides, as a step."""
    out = r.allocate(x.shape, stride, x.dtype)
    r.emit("copy", (x,), (out,))
    return out


def rows(r: Recorder, x: Tensor) -> Tensor:
    """A tensor as a matrix of its last dimension; copied where its strides do not allow that."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return copied(r, x, torch.empty(x.shape, device="meta").stride()).view(-1, x.shape[-1])


def spread(value: Any, dims: int) -> list[int]:
    """One number for each spatial dimension."""
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * dims if len(values) == 1 else values


def convolution(
    r: Recorder, x: Tensor, w: Any, b: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    """A convolution in one to three dimensions with constant weights; its output is channels-last."""
    dims = w.dim() - 2
    constant = not w.is_meta and (b is None or not b.is_meta)
    if not constant or x.dim() != w.dim() or x.dtype != torch.float32 or dims not in (1, 2, 3):
        return NotImplemented
    stride, dilation = spread(stride, dims), spread(dilation, dims)
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(dilation, w.shape[2:], strict=True)]
        if padding == "same" and any(n % 2 for n in reach):
            return NotImplemented
        padding = [n // 2 for n in reach] if padding == "same" else [0] * dims
    padding = spread(padding, dims)
    if dims == 1:
        wide = convolution(r, x.unsqueeze(2), w.unsqueeze(2), b, [1, *stride], [0, *padding], [1, *dilation], groups)
        return wide.squeeze(2)
    matrix = dims == 2 and groups == 1 and all(n == 1 for n in (*w.shape[2:], *stride)) and not any(padding)
    if not (channels_last(x) or (matrix and _pixels(x) is not None)):
        x = copied(r, x, channels_last_strides(x.shape))
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
    ]
    shape = (x.shape[0], w.shape[0], *size)
    out = r.allocate(shape, channels_last_strides(shape), x.dtype)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "act": None, "matrix": matrix}
    r.emit("convolution", (x, w, b, None), (out,), into=(3,), **options)
    return out


def _pixels(x: Tensor) -> Tensor | None:
    """An image as a matrix of pixels by channels, where strides allow that."""
    try:
        return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
    except RuntimeError:
        return None


def linear(r: Recorder, x: Tensor, w: Any, b: Any = None) -> Any:
    """A linear layer, as a product of rows."""
    if not isinstance(w, Tensor) or w.is_meta or x.dim() < 2 or x.dtype != torch.float32 or (b is not None and b.is_meta):
        return NotImplemented
    shape = (*x.shape[:-1], w.shape[0])
    flat = rows(r, x)
    out = r.allocate(shape, torch.empty(shape, device="meta").stride(), x.dtype)
    r.emit("matrix", (flat, w.t(), b), (out.view(-1, w.shape[0]),), batch=False)
    return out


def product(r: Recorder, a: Tensor, b: Tensor, bias: Any = None, beta: float = 1, alpha: float = 1) -> Any:
    """``mm``, ``bmm`` or ``addmm`` without scales."""
    if a.dtype != torch.float32 or beta != 1 or alpha != 1 or (bias is not None and bias.dim() != 1):
        return NotImplemented
    shape = (*a.shape[:-1], b.shape[-1])
    out = r.allocate(shape, torch.empty(shape, device="meta").stride(), a.dtype)
    r.emit("matrix", (a, b, bias), (out,), batch=a.dim() == 3)
    return out


def attention(
    r: Recorder, q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *, scale: Any = None, enable_gqa: bool = False
) -> Any:  # fmt: skip
    """Scaled dot-product attention, its mask as numbers to add."""
    if any(t.dim() != 4 or t.dtype != torch.float32 or not t.is_meta for t in (q, k, v)) or dropout_p:
        return NotImplemented
    n, h, length, e = q.shape
    if is_causal:
        attn_mask = torch.full((length, k.shape[2]), -math.inf).triu(1)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            if attn_mask.is_meta:
                return NotImplemented
            attn_mask = torch.zeros(attn_mask.shape).masked_fill_(~attn_mask, -math.inf)
        attn_mask = attn_mask.expand(n, h, length, k.shape[2])
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1 or k.shape[0] != n or h % k.shape[1]:
        return NotImplemented
    out = r.allocate((n, length, h, v.shape[-1]), torch.empty(n, length, h, v.shape[-1], device="meta").stride(), q.dtype).transpose(1, 2)
    r.emit("attention", (q, k, v, attn_mask), (out,), scale=e**-0.5 if scale is None else scale)
    return out
