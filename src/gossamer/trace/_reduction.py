"""Rules for norms, pooling, resampling and reductions: labels pass; a reduction over channels makes them inexact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.trace._movement import fixed
from gossamer.trace._planes import Operand, Planes, collapse, join, varies
from gossamer.trace._rules import rule
from gossamer.trace._watch import Call, Watch


@rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm batch_norm "
    "_native_batch_norm_legit_functional _batch_norm_with_update"
)
def batch_norm(watch: Watch, call: Call) -> list[Planes]:
    """One statistic for each position of dimension 1."""
    x = call.tensors[0]
    training = "no_training" not in call.op and bool(call.arg(5, "training", False))
    vectors = [t for t in call.tensors[1:] if t.dim() == 1 and t.shape[0] == x.shape[1]]
    planes = []
    for p in watch.planes(x):
        if p.shape[1] > 1:
            p = collapse(watch.ledger, p, [d for d in range(x.dim()) if d != 1], call.where)
        elif training and varies(p):
            watch.ledger.blur(p, lambda: f"averaged over in {call.where()}")
        planes.append(p)
    view = [1, -1] + [1] * (x.dim() - 2)
    operands = [Operand(tuple(x.shape), tuple(planes), watch.operand(x).what)]
    for t in vectors:
        o = watch.operand(t)
        operands.append(Operand((1, x.shape[1], *[1] * (x.dim() - 2)), tuple(p.reshape(view) for p in o.planes), o.what))
    return [join(watch.ledger, operands, x.dim(), call.where), *[()] * (len(call.outputs) - 1)]


@rule("native_layer_norm _fused_rms_norm")
def layer_norm(watch: Watch, call: Call) -> list[Planes]:
    """A norm over the last dimensions: inexact where channels lie there."""
    x, shape = call.tensors[0], call.arg(1, "normalized_shape")
    planes = join(watch.ledger, [watch.operand(t) for t in call.tensors], x.dim(), call.where)
    dims = range(x.dim() - len(shape), x.dim())
    _blur(watch, call, planes, dims)
    if len(shape) == 1:
        for p in planes:
            if p.shape[-1] > 1 and p.numel() == p.shape[-1]:
                watch.ledger.declare(call.path, p)
    return [planes, *[()] * (len(call.outputs) - 1)]


@rule("native_group_norm")
def group_norm(watch: Watch, call: Call) -> list[Planes]:
    """A norm over groups of channels: they leave as whole groups, or equally many from each."""
    x, groups = call.tensors[0], call.arg(6, "group")
    planes = []
    for p in watch.planes(x):
        if p.shape[1] > 1:
            p = collapse(watch.ledger, p, [d for d in range(x.dim()) if d != 1], call.where)
        elif any(p.shape[d] > 1 for d in range(2, x.dim())):
            _blur(watch, call, (p,), range(2, x.dim()))
        planes.append(p)
    view = [1, -1] + [1] * (x.dim() - 2)
    operands = [Operand(tuple(x.shape), tuple(planes), watch.operand(x).what)]
    for t in call.tensors[1:]:
        o = watch.operand(t)
        operands.append(Operand((1, x.shape[1], *[1] * (x.dim() - 2)), tuple(p.reshape(view) for p in o.planes), o.what))
    joined = join(watch.ledger, operands, x.dim(), call.where)
    for p in joined:
        if p.shape[1] > 1:
            watch.ledger.rectangle("group", p.reshape(groups, -1), note=f"normalised over channels in {call.where()}")
    return [joined, *[()] * (len(call.outputs) - 1)]


@rule("_softmax _log_softmax softmax log_softmax _safe_softmax cumsum cumprod logcumsumexp")
def along(watch: Watch, call: Call) -> list[Planes]:
    """Every element depends on all others along one dimension."""
    x = call.tensors[0]
    planes = watch.planes(x)
    _blur(watch, call, planes, [call.arg(1, "dim") % max(x.dim(), 1)])
    return [planes] * len(call.outputs)


@rule(
    "sum mean amax amin max min prod any all var std var_mean std_mean norm linalg_vector_norm logsumexp argmax argmin median nanmedian "
    "nansum nanmean aminmax count_nonzero _weight_norm_interface"
)
def reduction(watch: Watch, call: Call) -> list[Planes]:
    """A reduction: labels pass where they are not reduced over."""
    x = call.tensors[0]
    planes = watch.planes(x)
    if len(call.tensors) > 1 and call.tensors[1].dim() and call.op in ("max", "min"):
        return [join(watch.ledger, [watch.operand(t) for t in call.tensors], call.outputs[0].dim(), call.where)]
    if call.op == "_weight_norm_interface":
        return _weight_norm(watch, call)
    dims, keep = _reduced(call, x)
    return [reduce(watch, call, planes, dims, keep)] * len(call.outputs)


def _reduced(call: Call, x: Tensor) -> tuple[list[int], bool]:
    """Dimensions a reduction runs over, and whether they stay with size 1, read off its schema."""
    values = {a.name: v for a, v in zip(call.func._schema.arguments, call.args, strict=False)} | call.kwargs
    dims = values.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    if dims is None or len(dims) == 0:
        dims = range(x.dim())
    return [d % max(x.dim(), 1) for d in dims], bool(values.get("keepdim", False))


def reduce(watch: Watch, call: Call, planes: Planes, dims: Sequence[int], keep: bool) -> Planes:
    """Planes of a reduction over ``dims``: labels laid out over reduced and other dimensions are coupled along the reduced ones."""
    results = []
    for p in planes:
        if any(p.shape[d] > 1 for d in dims):
            if all(d in dims for d in varies(p)):
                call.blurs += ((p, f"reduced over in {call.where()}"),)
                continue
            p = collapse(watch.ledger, p, dims, call.where)
        results.append(p if keep else p.reshape([n for d, n in enumerate(p.shape) if d not in dims]))
    return tuple(results)


def _weight_norm(watch: Watch, call: Call) -> list[Planes]:
    v, g, dim = call.args[0], call.args[1], call.arg(2, "dim", 0)
    planes = join(watch.ledger, [watch.operand(v), watch.operand(g)], v.dim(), call.where)
    _blur(watch, call, planes, [d for d in range(v.dim()) if d != dim % v.dim()])
    return [planes, *[()] * (len(call.outputs) - 1)]


@rule(
    "max_pool2d_with_indices max_pool3d_with_indices max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d adaptive_max_pool3d mkldnn_max_pool2d "
    "mkldnn_adaptive_avg_pool2d "
    "fractional_max_pool2d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa"
)
def resample(watch: Watch, call: Call) -> list[Planes]:
    """Pooling, padding and resampling over space: labels do not vary there."""
    x = call.tensors[0]
    digits = [c for c in call.op if c in "123"]
    space = range(x.dim() - int(digits[-1]), x.dim())
    planes = []
    for p in watch.planes(x):
        if any(p.shape[d] > 1 for d in range(x.dim()) if d not in space):
            planes.append(collapse(watch.ledger, p, space, call.where))
        else:
            planes += fixed(watch, call, (p,), space)
    return [tuple(planes)] * len(call.outputs)


@rule("grid_sampler_2d grid_sampler_3d")
def grid_sample(watch: Watch, call: Call) -> list[Planes]:
    """Sampling over space at given places."""
    x, grid = call.tensors[0], call.tensors[1]
    fixed(watch, call, watch.planes(grid), range(grid.dim()))
    return [fixed(watch, call, watch.planes(x), range(2, x.dim()))]


def _blur(watch: Watch, call: Call, planes: Planes, dims: Sequence[int]) -> None:
    """A norm over labelled dimensions: inexact, except for what leaves with a whole row."""
    for p in planes:
        if any(p.shape[d] > 1 for d in dims):
            others = [d for d in range(p.dim()) if d not in dims]
            rows = p.permute(*others, *[d for d in range(p.dim()) if d in dims]).flatten(len(others)) if others else p.reshape(1, -1)
            watch.ledger.blur_rows(rows.reshape(-1, rows.shape[-1]), lambda: f"normalised over channels in {call.where()}")


__all__ = ["batch_norm", "reduce", "torch"]
