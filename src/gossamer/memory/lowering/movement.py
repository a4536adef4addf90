"""Rules of what only moves elements: concatenation, copies, padding, rolls, scatters and look-ups."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.memory.lowering.contractions import copied
from gossamer.memory.lowering.strides import dense_strides, image_strides

if TYPE_CHECKING:
    from gossamer.memory.lowering.recording import Recorder


def cat(r: Recorder, tensors: Any, dim: int = 0) -> Any:
    """A concatenation: nothing where the parts lie there already, else one copy for each."""
    tensors = [t for t in tensors if not (t.dim() == 1 and t.numel() == 0)]
    if len({t.dtype for t in tensors}) > 1:
        return NotImplemented
    dim = dim % tensors[0].dim()
    shape = [n if d != dim else sum(t.shape[dim] for t in tensors) for d, n in enumerate(tensors[0].shape)]
    joined = _joined(r, tensors, dim, shape)
    if joined is not None:
        return joined
    first = next(t for t in tensors if t.is_meta)
    stride = image_strides(first, shape) if first.dim() == 4 else torch.empty(shape, device="meta").stride()
    out = r.allocate(shape, stride, first.dtype)
    starts = [0, *itertools.accumulate(t.shape[dim] for t in tensors)]
    for i, t in enumerate(tensors):
        part = out.narrow(dim, starts[i], t.shape[dim])
        if r.view(t) != r.view(part):  # where they are the same, what makes it writes it there
            r.emit("copy", (t,), (part,), joins=r.key(out), dim=dim, start=starts[i])
    return out


def _joined(r: Recorder, tensors: list[Tensor], dim: int, shape: list[int]) -> Tensor | None:
    """The concatenation as a view, where its parts already lie side by side in one buffer."""
    first = tensors[0]
    if not all(t.is_meta for t in tensors):
        return None
    offset = first.storage_offset()
    for t in tensors:
        same = t.untyped_storage()._cdata == first.untyped_storage()._cdata and t.stride() == first.stride()
        if not same or t.storage_offset() != offset:
            return None
        offset += t.shape[dim] * t.stride(dim)
    return first.as_strided(shape, first.stride(), first.storage_offset())


def stack(r: Recorder, tensors: Any, dim: int = 0) -> Any:
    """A concatenation along a new dimension."""
    return cat(r, [t.unsqueeze(dim) for t in tensors], dim)


def clone(r: Recorder, x: Any, *, memory_format: Any = None) -> Any:
    """A copy, in the memory format asked for."""
    if memory_format in (None, torch.preserve_format):
        out = r.like(x)
    else:
        out = r.allocate(x.shape, torch.empty(x.shape, device="meta").to(memory_format=memory_format).stride(), x.dtype)
    r.emit("copy", (x,), (out,), into=(0,))
    return out


def converted(
    r: Recorder, x: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, memory_format: Any = None, **rest: Any
) -> Any:
    """A copy of another type."""
    out = r.like(x, dtype)
    r.emit("copy", (x,), (out,))
    return out


def constant_pad(r: Recorder, x: Any, pad: Any, value: float = 0.0) -> Any:
    """A filled buffer and a copy into the middle; negative amounts cut."""
    shape, inner = list(x.shape), x
    spots = []
    for i in range(len(pad) // 2):
        before, after = int(pad[2 * i]), int(pad[2 * i + 1])
        d = x.dim() - 1 - i
        inner = inner.narrow(d, max(0, -before), inner.shape[d] - max(0, -before) - max(0, -after))
        shape[d] = x.shape[d] + before + after
        spots.append((d, max(0, before), inner.shape[d]))
    out = r.allocate(shape, image_strides(x, shape) if x.dim() == 4 else torch.empty(shape, device="meta").stride(), x.dtype)
    target = out
    for d, start, length in spots:
        target = target.narrow(d, start, length)
    r.emit("fill", (), (out,), value=value)
    r.emit("copy", (inner,), (target,))
    return out


def pad(r: Recorder, x: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    """Padding with a constant; other modes run as they are."""
    return constant_pad(r, x, pad, 0.0 if value is None else value) if mode == "constant" else NotImplemented


def viewed(r: Recorder, x: Any, size: Any) -> Any:
    """A view of another shape; of a contiguous copy where strides do not allow it."""
    try:
        return torch.ops.aten.view(x, size)
    except RuntimeError:
        return torch.ops.aten.view(clone(r, x, memory_format=torch.contiguous_format), size)


def roll(r: Recorder, x: Any, shifts: Any, dims: Any = ()) -> Any:
    """Up to two copies for each dimension that is rolled."""
    shifts, dims = (list(v) if isinstance(v, list | tuple) else [v] for v in (shifts, dims))
    if len(shifts) != len(dims):
        return NotImplemented
    out = r.like(x)
    cuts = [(d % x.dim(), s % x.shape[d]) for s, d in zip(shifts, dims, strict=True)]
    for piece in itertools.product(*[((0, n - s, s), (n - s, s, 0)) if s else ((0, n, 0),) for d, s in cuts for n in [x.shape[d]]]):
        source, target = x, out
        for (d, _), (start, length, goal) in zip(cuts, piece, strict=True):
            source, target = source.narrow(d, start, length), target.narrow(d, goal, length)
        r.emit("copy", (source,), (target,))
    return out


def slice_scatter(r: Recorder, x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """A copy with a slice replaced."""
    out = r.allocate(x.shape, dense_strides(x), x.dtype)
    r.emit("copy", (x,), (out,), into=(0,))
    r.emit("copy", (source,), (torch.ops.aten.slice(out, dim, start, end, step),))
    return out


def select_scatter(r: Recorder, x: Any, source: Any, dim: int, index: int) -> Any:
    """A copy with one index replaced."""
    out = r.allocate(x.shape, dense_strides(x), x.dtype)
    r.emit("copy", (x,), (out,), into=(0,))
    r.emit("copy", (source,), (out.select(dim, index),))
    return out


def embedding(r: Recorder, w: Any, index: Any, *_: Any) -> Any:
    """Rows of a constant table."""
    if w.is_meta:
        return NotImplemented
    shape = (*index.shape, w.shape[1])
    out = r.allocate(shape, torch.empty(shape, device="meta").stride(), w.dtype)
    flat = index if index.is_contiguous() or not index.is_meta else copied(r, index, torch.empty(index.shape, device="meta").stride())
    r.emit("index_select", (w, flat.view(-1)), (out.view(-1, w.shape[1]),), dim=0)
    return out


def index_select(r: Recorder, x: Any, dim: int, index: Any) -> Any:
    """Slices by an index."""
    shape = list(x.shape)
    shape[dim] = index.numel()
    out = r.allocate(shape, torch.empty(shape, device="meta").stride(), x.dtype)
    r.emit("index_select", (x, index), (out,), dim=dim)
    return out


def index(r: Recorder, x: Any, indices: Any) -> Any:
    """Indexing by one vector of positions; anything else runs as it is."""
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) == 1 and given[0][1].dim() == 1 and given[0][1].dtype == torch.int64:
        return index_select(r, x, *given[0])
    return NotImplemented


def dropout(r: Recorder, x: Any, *rest: Any, **options: Any) -> Any:
    """The input, since nothing is dropped in inference."""
    return NotImplemented if len(rest) > 1 and rest[1] is True else x


def constant_like(make: Callable[..., Tensor]) -> Callable[..., Any]:
    """A rule that makes a constant of the input's type."""

    def rule(r: Recorder, x: Any, *args: Any, dtype: Any = None, **rest: Any) -> Any:
        return make(x, *args, dtype=dtype or x.dtype)

    return rule
