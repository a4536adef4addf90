"""Rules of norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gossamer.memory.lowering.recording import Recorder


def _batch_norm(r: Recorder, x: Any, w: Any, b: Any, mean: Any, var: Any, *rest: Any) -> Any:
    """A batch norm on its running statistics, as a scale and a shift for each channel."""
    if any(isinstance(t, Tensor) and t.is_meta for t in (w, b, mean, var)) or mean is None or x.dtype != torch.float32:
        return NotImplemented
    eps = rest[-1]
    scale = (var.double() + eps).rsqrt() * (1.0 if w is None else w.double())
    shift = (0.0 if b is None else b.double()) - mean.double() * scale
    shape = (1, -1, *[1] * (x.dim() - 2))
    out = r.like(x)
    r.emit("affine", (x, scale.float().view(shape), shift.float().view(shape)), (out,), into=(0,), act=None)
    return out


def whole_batch_norm(r: Recorder, x: Any, w: Any, b: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float, *_: Any) -> Any:
    """``batch_norm`` in eval mode."""
    return NotImplemented if training else _batch_norm(r, x, w, b, mean, var, eps)


def native_batch_norm(r: Recorder, x: Any, *rest: Any) -> Any:
    """The form that also returns statistics, which nothing reads in inference."""
    out = _batch_norm(r, x, *rest)
    return out if out is NotImplemented else (out, *(torch.empty(0, device="meta") for _ in range(2)))


def layer_norm(r: Recorder, x: Any, shape: Any, w: Any, b: Any, eps: float) -> Any:
    """A norm over the last dimensions."""
    if any(isinstance(t, Tensor) and t.is_meta for t in (w, b)) or x.dtype != torch.float32:
        return NotImplemented
    out = r.like(x)
    r.emit("norm", (x, w, b), (out,), into=(0,), dims=list(range(x.dim() - len(shape), x.dim())), eps=eps)
    small = [torch.empty(0, device="meta") for _ in range(2)]
    return (out, *small)


def group_norm(r: Recorder, x: Any, w: Any, b: Any, n: int, c: int, hw: int, groups: int, eps: float) -> Any:
    """A norm over groups of channels, where they can be viewed as such."""
    if any(isinstance(t, Tensor) and t.is_meta for t in (w, b)) or x.dtype != torch.float32 or x.dim() < 3:
        return NotImplemented
    out = r.like(x)
    split = (int(n), groups, int(c) // groups, *x.shape[2:])
    shape = (1, groups, int(c) // groups, *[1] * (x.dim() - 2))
    try:
        views = x.view(split), out.view(split)
    except RuntimeError:
        return NotImplemented
    weights = [None if t is None else t.reshape(shape) for t in (w, b)]
    r.emit("norm", (views[0], *weights), (views[1],), into=(0,), dims=list(range(2, len(split))), eps=eps)
    return (out, *(torch.empty(0, device="meta") for _ in range(2)))
