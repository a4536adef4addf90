"""What each operation of a captured graph becomes: steps whose kernels write where they are told.

`NODES` holds rules for operations as they stand in the graph, `primitive` those that composite ones fall into. An operation
without a rule runs as it is, into memory of the allocator, and its result is copied into the arena; the step says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gossamer.errors import ExportError
from gossamer.memory.kernels.pointwise import COMPARISONS, POINTWISE
from gossamer.memory.lowering.contractions import attention, convolution, linear, product
from gossamer.memory.lowering.movement import (
    cat,
    clone,
    constant_like,
    constant_pad,
    converted,
    dropout,
    embedding,
    index,
    index_select,
    pad,
    roll,
    select_scatter,
    slice_scatter,
    stack,
    viewed,
)
from gossamer.memory.lowering.norms import group_norm, layer_norm, native_batch_norm, whole_batch_norm
from gossamer.memory.lowering.pooling import adaptive_avg_pool, avg_pool, bare, max_pool, reduced, softmax, upsample, vector_norm
from gossamer.memory.lowering.strides import contiguous, dense_strides
from gossamer.memory.program import Slot

if TYPE_CHECKING:
    from gossamer.memory.lowering.recording import Recorder

SPATIAL = {
    "conv2d", "conv3d", "max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "max_pool3d", "avg_pool3d", "batch_norm",
    "_native_batch_norm_legit_no_training", "constant_pad_nd", "pad",
}  # fmt: skip


def op_name(target: Any) -> str:
    """``"conv2d"`` for ``aten.conv2d.default``; ``""`` for what is no tensor operation."""
    return target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


NODES: dict[str, Callable[..., Any]] = {
    "conv1d": convolution,
    "conv2d": convolution,
    "conv3d": convolution,
    "linear": linear,
    "scaled_dot_product_attention": attention,
    "batch_norm": whole_batch_norm,
    "_native_batch_norm_legit_no_training": native_batch_norm,
    "max_pool2d": max_pool,
    "avg_pool2d": avg_pool,
    "adaptive_avg_pool2d": adaptive_avg_pool,
    "dropout": dropout,
    "feature_dropout": dropout,
    "alpha_dropout": dropout,
    "feature_alpha_dropout": dropout,
    "cat": cat,
    "stack": stack,
    "pad": pad,
    "view": viewed,
    "_unsafe_view": viewed,
    "new_zeros": constant_like(lambda x, size, dtype: torch.zeros(size, dtype=dtype)),
    "new_ones": constant_like(lambda x, size, dtype: torch.ones(size, dtype=dtype)),
    "new_full": constant_like(lambda x, size, value, dtype: torch.full(size, value, dtype=dtype)),
    "zeros_like": constant_like(lambda x, dtype: torch.zeros(x.shape, dtype=dtype)),
    "ones_like": constant_like(lambda x, dtype: torch.ones(x.shape, dtype=dtype)),
    "full_like": constant_like(lambda x, value, dtype: torch.full(x.shape, value, dtype=dtype)),
}


PRIMITIVES: dict[str, Callable[..., Any]] = {
    **NODES,
    "convolution": lambda r, x, w, b, s, p, d, transposed, op, g: NotImplemented if transposed else convolution(r, x, w, b, s, p, d, g),
    "mm": product,
    "bmm": product,
    "addmm": lambda r, bias, a, b, *, beta=1, alpha=1: product(r, a, b, bias, beta, alpha),
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
    "_adaptive_avg_pool2d": adaptive_avg_pool,
    "mean": reduced("mean"),
    "sum": reduced("sum"),
    "amax": reduced("amax"),
    "amin": reduced("amin"),
    "linalg_vector_norm": vector_norm,
    "_softmax": softmax,
    "clone": clone,
    "_to_copy": converted,
    "constant_pad_nd": constant_pad,
    "roll": roll,
    "slice_scatter": slice_scatter,
    "select_scatter": select_scatter,
    "embedding": embedding,
    "index_select": index_select,
    "index": index,
    "_reshape_copy": lambda r, x, size: torch.ops.aten.view(clone(r, x, memory_format=torch.contiguous_format), size),
    "upsample_nearest2d": upsample("upsample_nearest2d"),
    "upsample_bilinear2d": upsample("upsample_bilinear2d"),
    "upsample_bicubic2d": upsample("upsample_bicubic2d"),
}


SAME_SHAPE = frozenset({"relu", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh"})
"""Operations whose output is like their input, which need not be asked for."""


def primitive(r: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Steps of a primitive operation; what it returns has no memory, like its arguments."""
    name = op_name(func)
    rule = PRIMITIVES.get(name)
    if rule is not None:
        result = rule(r, *args, **kwargs)
        if result is not NotImplemented:
            return result
    if name.endswith("_") and name[:-1] in POINTWISE and func._schema.is_mutable:
        return _pointwise(r, name[:-1], args[0], args, kwargs, out=args[0])
    same = name in SAME_SHAPE and args[0].is_floating_point()
    outcome = args[0] if same else _shapes(func, args, kwargs)
    if name in POINTWISE and isinstance(outcome, Tensor):
        return _pointwise(r, name, outcome, args, kwargs)
    return _as_it_is(r, func, outcome, args, kwargs)


def _shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation returns, without memory."""
    plain = pytree.tree_map(lambda t: bare(t) if isinstance(t, Tensor) else t, (args, kwargs))
    try:
        return func(*plain[0], **plain[1])
    except Exception as e:
        raise ExportError(f"memory cannot be planned: nothing is known about the output of {func}: {str(e).splitlines()[0]}") from None


def _pointwise(r: Recorder, name: str, outcome: Tensor, args: Any, kwargs: Any, out: Tensor | None = None) -> Any:
    """Emit an operation element by element; its output may lie on any input of the same shape and type."""
    slots: list[Any] = []

    def slot(t: Any) -> Any:
        if not isinstance(t, Tensor) or (t.dim() == 0 and not t.is_meta):
            return t
        slots.append(t)
        return Slot(len(slots) - 1)

    template = pytree.tree_map(slot, (tuple(args), dict(kwargs)))
    same = [i for i, t in enumerate(slots) if t.is_meta and t.shape == outcome.shape]
    if out is not None:
        r.emit("pointwise", slots, (out,), op=name, template=template)
        return out
    dtype = torch.bool if name in COMPARISONS else outcome.dtype
    out = r.allocate(outcome.shape, dense_strides(slots[same[0]]) if same else contiguous(outcome.shape), dtype)
    r.emit("pointwise", slots, (out,), into=tuple(i for i in same if slots[i].dtype == dtype), op=name, template=template)
    return out


def _as_it_is(r: Recorder, func: Any, outcome: Any, args: Any, kwargs: Any) -> Any:
    """Emit an operation that torch runs outside the arena, with the bytes that it allocates there."""
    slots: list[Any] = []

    def slot(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        slots.append(t)
        return Slot(len(slots) - 1)

    template = pytree.tree_map(slot, (tuple(args), dict(kwargs)))
    leaves, spec = pytree.tree_flatten(outcome)
    outs = [r.allocate(t.shape, dense_strides(t), t.dtype) if isinstance(t, Tensor) else t for t in leaves]
    tensors = [t for t in outs if isinstance(t, Tensor)]
    outside = sum(t.numel() * t.element_size() for t in tensors)
    r.emit("as_it_is", slots, tensors, outside=outside, func=func, template=template)
    return pytree.tree_unflatten(outs, spec)
