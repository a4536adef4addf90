"""Rules for data movement: the same movement of the labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.trace._planes import Operand, Planes, collapse, compress, join, move, reshape, varies
from gossamer.trace._rules import rule
from gossamer.trace._watch import Call, Watch


def _boxes(watch: Watch, planes: Planes) -> Planes:
    """What varies along several dimensions must stay rectangular."""
    for plane in planes:
        if sum(n > 1 for n in plane.shape) > 1:
            watch.ledger.rectangle("box", plane)
    return planes


@rule("permute transpose t unsqueeze squeeze expand")
def same_view(watch: Watch, call: Call) -> list[Planes]:
    """Dimensions change places, come or go: so do the labels'."""
    x = call.tensors[0]
    return [tuple(move(lambda full: call.func(full, *call.args[1:], **call.kwargs), p, x.shape) for p in watch.planes(x))]


@rule("squeeze_ unsqueeze_ transpose_ t_ swapaxes_ swapdims_")
def same_view_in_place(watch: Watch, call: Call) -> list[Planes]:
    """The same, of the tensor itself."""
    (shape, _), view = call.before, call.op.removesuffix("_")
    return [tuple(move(lambda full: getattr(full, view)(*call.args[1:], **call.kwargs), p, shape) for p in watch.planes(call.tensors[0]))]


@rule("as_strided as_strided_")
def strided(watch: Watch, call: Call) -> list[Planes]:
    """Another layout of the same elements; anything else addresses positions."""
    x, out = call.tensors[0], call.outputs[0]
    shape, stride = call.before or (tuple(x.shape), x.stride())
    planes = watch.planes(x)
    same = shape == tuple(out.shape) and all(n == 1 or a == b for n, a, b in zip(shape, stride, out.stride(), strict=True))
    return [planes if same else fixed(watch, call, planes, range(len(shape)))]


@rule("diagonal unfold")
def window(watch: Watch, call: Call) -> list[Planes]:
    """Views that pick positions: labels that vary along the dimensions picked from stay."""
    x = call.tensors[0]
    dims = [call.arg(2, "dim1", 0), call.arg(3, "dim2", 1)] if call.op == "diagonal" else [call.arg(1, "dimension")]
    planes = fixed(watch, call, watch.planes(x), [d % x.dim() for d in dims])
    return [tuple(move(lambda full: call.func(full, *call.args[1:], **call.kwargs), p, x.shape) for p in planes)]


@rule("view _unsafe_view reshape _reshape_alias view_copy _reshape_copy flatten unflatten")
def view(watch: Watch, call: Call) -> list[Planes]:
    """A reshape: where it splits a labelled dimension, what stays must be rectangular."""
    x, out = call.tensors[0], call.outputs[0]
    planes = watch.planes(x)
    if not planes:
        return [()]
    if x.dtype != out.dtype or x.numel() == 0:  # the same bytes read as another type; nothing at all
        return [fixed(watch, call, planes, range(x.dim()))]
    return [_boxes(watch, tuple(reshape(p, x.shape, out.shape) for p in planes))]


@rule("slice select")
def part(watch: Watch, call: Call) -> list[Planes]:
    """A part of a dimension. One channel picked by its position has to stay."""
    x = call.tensors[0]
    dim = call.arg(1, "dim", 0) % x.dim()
    planes = []
    for p in watch.planes(x):
        q = move(lambda full: call.func(full, *call.args[1:], **call.kwargs), p, x.shape)
        if p.shape[dim] > 1 and q.numel() < p.numel():
            _picked(watch, call, q)
        planes.append(q)
    return [tuple(planes)]


def _picked(watch: Watch, call: Call, plane: Tensor) -> None:
    if plane.numel() == 1:
        watch.ledger.freeze(plane, lambda: f"picked by its position in {call.where()}")
    elif plane.numel():
        watch.ledger.slot(plane)


@rule("split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk tensor_split")
def split(watch: Watch, call: Call) -> list[Planes]:
    """Equal parts stay equal: as many channels leave each."""
    x = call.tensors[0]
    dim = call.arg(2, "dim", 0) % x.dim()
    results: list[list[Tensor]] = [[] for _ in call.outputs]
    for p in watch.planes(x):
        parts = [compress(q) for q in call.func(p.expand(x.shape), *call.args[1:], **call.kwargs)]
        if p.shape[dim] > 1 and len(parts) > 1:
            if len({o.shape[dim] for o in call.outputs}) == 1:
                watch.ledger.rectangle("even", torch.stack([q.movedim(dim, 0).reshape(-1) for q in parts]), note=call.where())
            for q in parts:
                _picked(watch, call, q)
        for result, q in zip(results, parts, strict=True):
            result.append(q)
    return [tuple(r) for r in results]


@rule("unbind")
def unbind(watch: Watch, call: Call) -> list[Planes]:
    """Every position of a dimension by itself."""
    x = call.tensors[0]
    dim = call.arg(1, "dim", 0) % x.dim()
    results: list[list[Tensor]] = [[] for _ in call.outputs]
    for p in watch.planes(x):
        for result, q in zip(results, (p.expand(x.shape)).unbind(dim), strict=True):
            q = compress(q)
            if p.shape[dim] > 1:
                _picked(watch, call, q)
            result.append(q)
    return [tuple(r) for r in results]


@rule("cat concat concatenate")
def cat(watch: Watch, call: Call) -> list[Planes]:
    """Labels one after the other; along every other dimension operands must agree."""
    tensors = [t for t in call.tensors if not (t.dim() == 1 and t.numel() == 0)]
    out = call.outputs[0]
    return [concatenate(watch, call, [watch.operand(t) for t in tensors], call.arg(1, "dim", 0) % max(out.dim(), 1))]


@rule("stack")
def stack(watch: Watch, call: Call) -> list[Planes]:
    """A concatenation along a new dimension."""
    dim = call.arg(1, "dim", 0) % call.outputs[0].dim()
    operands = []
    for t in call.tensors:
        o = watch.operand(t)
        shape = (*o.shape[:dim], 1, *o.shape[dim:])
        operands.append(Operand(shape, tuple(p.unsqueeze(dim) for p in o.planes), o.what, o.weight))
    return [concatenate(watch, call, operands, dim)]


def concatenate(watch: Watch, call: Call, operands: list[Operand], dim: int) -> Planes:
    """Planes of a concatenation."""
    if not any(o.planes for o in operands):
        return ()
    ndim = len(operands[0].shape)
    along = [[p for p in o.planes if p.shape[dim] > 1] for o in operands]
    across = [
        Operand((*o.shape[:dim], 1, *o.shape[dim + 1 :]), tuple(p for p in o.planes if p.shape[dim] == 1), o.what, o.weight)
        for o in operands
    ]
    beside = [d for o in across for p in o.planes for d in varies(p)]
    if any(len(planes) > 1 or any(d in beside for p in planes for d in varies(p)) for planes in along):
        for planes in along:
            for p in planes:
                watch.ledger.freeze(p, lambda: f"independent sets of channels meet in {call.where()}")
        along = [[] for _ in along]
    result = join(watch.ledger, across, ndim, call.where)
    if not any(along):
        return result
    rest = [max(p.shape[d] for planes in along for p in planes) for d in range(ndim)]
    none = torch.zeros([1] * ndim, dtype=torch.long)
    pieces = [(p[0] if p else none).expand([*rest[:dim], o.shape[dim], *rest[dim + 1 :]]) for o, p in zip(operands, along, strict=True)]
    return (*result, *_boxes(watch, (torch.cat(pieces, dim),)))


@rule("flip")
def flip(watch: Watch, call: Call) -> list[Planes]:
    """Labels in reverse."""
    return [tuple(p.flip(call.arg(1, "dims")) for p in watch.planes(call.tensors[0]))]


@rule("roll")
def roll(watch: Watch, call: Call) -> list[Planes]:
    """A rotation by a number of positions: along a labelled dimension everything has to stay."""
    x = call.tensors[0]
    dims = [d % x.dim() for d in call.arg(2, "dims", ())] or range(x.dim())
    planes = watch.planes(x)
    for p in planes:
        if any(p.shape[d] > 1 for d in dims):
            watch.ledger.freeze(p, lambda: f"moved by a fixed number of positions in {call.where()}")
    return [tuple(p.roll(call.args[1], call.arg(2, "dims", ())) for p in planes)]


@rule("repeat")
def repeat(watch: Watch, call: Call) -> list[Planes]:
    """Labels repeated with the data."""
    x, times = call.tensors[0], list(call.arg(1, "repeats"))
    lead = len(times) - x.dim()
    planes = []
    for p in watch.planes(x):
        q = p.reshape((1,) * lead + tuple(p.shape))
        planes.append(q.repeat([n if q.shape[d] > 1 else 1 for d, n in enumerate(times)]))
    return [tuple(planes)]


@rule("repeat_interleave")
def repeat_interleave(watch: Watch, call: Call) -> list[Planes]:
    """Every position repeated in place."""
    x = call.tensors[0]
    dim, times = call.arg(2, "dim"), call.arg(1, "repeats")
    if dim is None or not isinstance(times, int):
        return [fixed(watch, call, watch.planes(x), range(x.dim()))] if len(call.tensors) else [()]
    return [tuple(p.repeat_interleave(times, dim) if p.shape[dim] > 1 else p for p in watch.planes(x))]


@rule("constant_pad_nd")
def pad(watch: Watch, call: Call) -> list[Planes]:
    """Padding along a labelled dimension belongs to no channel."""
    amounts = list(call.arg(1, "pad"))
    planes = []
    for p in watch.planes(call.tensors[0]):
        wanted = [n if p.shape[p.dim() - 1 - i // 2] > 1 else 0 for i, n in enumerate(amounts)]
        planes.append(torch.constant_pad_nd(p, wanted, 0) if any(wanted) else p)
    return [tuple(planes)]


@rule("pixel_shuffle")
def pixel_shuffle(watch: Watch, call: Call) -> list[Planes]:
    """Groups of r*r channels become one channel each: they leave together."""
    r2 = call.arg(1, "upscale_factor") ** 2
    planes = []
    for p in watch.planes(call.tensors[0]):
        p = collapse(watch.ledger, p, [p.dim() - 2, p.dim() - 1], call.where)
        c = p.dim() - 3
        if p.shape[c] > 1:
            grid = p.unflatten(c, (p.shape[c] // r2, r2))
            p = collapse(watch.ledger, grid, [c + 1], call.where).squeeze(c + 1)
        planes.append(p)
    return [tuple(planes)]


@rule("pixel_unshuffle")
def pixel_unshuffle(watch: Watch, call: Call) -> list[Planes]:
    """Every channel becomes r*r channels."""
    r2 = call.arg(1, "downscale_factor") ** 2
    planes = []
    for p in watch.planes(call.tensors[0]):
        p = collapse(watch.ledger, p, [p.dim() - 2, p.dim() - 1], call.where)
        planes.append(p.repeat_interleave(r2, p.dim() - 3) if p.shape[p.dim() - 3] > 1 else p)
    return [tuple(planes)]


@rule("channel_shuffle native_channel_shuffle")
def channel_shuffle(watch: Watch, call: Call) -> list[Planes]:
    """Rows and columns of the channels change places."""
    groups = call.arg(1, "groups")
    planes = []
    for p in watch.planes(call.tensors[0]):
        if p.shape[1] > 1:
            (grid,) = _boxes(watch, (p.unflatten(1, (groups, -1)),))
            p = grid.transpose(1, 2).flatten(1, 2)
        planes.append(p)
    return [tuple(planes)]


@rule("im2col")
def im2col(watch: Watch, call: Call) -> list[Planes]:
    """Every channel becomes one for each position of the kernel."""
    kh, kw = call.arg(1, "kernel_size")
    planes = []
    for p in watch.planes(call.tensors[0]):
        p = collapse(watch.ledger, p, [2, 3], call.where).squeeze(3)
        planes.append(p.repeat_interleave(kh * kw, 1) if p.shape[1] > 1 else p)
    return [tuple(planes)]


@rule("index index_select gather take_along_dim masked_select index_put index_put_ _unsafe_index")
def index(watch: Watch, call: Call) -> list[Planes]:
    """Positions named by a tensor: along a labelled dimension everything has to stay."""
    x, out = call.tensors[0], call.outputs[0]
    for t in call.tensors[1:]:
        if not t.is_floating_point():
            fixed(watch, call, watch.planes(t), range(t.dim()))
    if call.op in ("index_select", "gather"):
        dim = call.arg(1, "dim") % max(x.dim(), 1)
        return [fixed(watch, call, watch.planes(x), [dim])]
    if call.op not in ("index", "_unsafe_index"):
        for t in call.tensors:
            fixed(watch, call, watch.planes(t), range(t.dim()))
        return [()] * len(call.outputs)
    dims: list[int] = []
    at = 0
    for i in call.arg(1, "indices"):
        width = 1 if i is None or i.dtype not in (torch.bool, torch.uint8) else i.dim()
        if i is not None:
            dims += range(at, at + width)
        at += width
    planes = fixed(watch, call, watch.planes(x), dims)
    together = dims == list(range(dims[0], dims[-1] + 1)) if dims else True
    others = [d for d in range(x.dim()) if d not in dims]
    added = out.dim() - len(others)
    first = dims[0] if together and dims else 0
    results = []
    for p in planes:
        sizes = [p.shape[d] for d in others]
        results.append(p.reshape([*sizes[:first], *[1] * added, *sizes[first:]]))
    return [tuple(results)]


@rule("embedding")
def embedding(watch: Watch, call: Call) -> list[Planes]:
    """Rows are looked up by value, so all of them stay; columns are produced."""
    weight, ids = call.args[0], call.args[1]
    planes = []
    for p in fixed(watch, call, watch.planes(weight), [0]):
        if p.shape[1] > 1:
            watch.ledger.mark(p, "out")
        planes.append(p.reshape((1,) * ids.dim() + (p.shape[1],)))
    return [tuple(planes)]


@rule("tril triu tril_ triu_")
def triangle(watch: Watch, call: Call) -> list[Planes]:
    """Positions matter along the last two dimensions."""
    x = call.tensors[0]
    return [fixed(watch, call, watch.planes(x), [x.dim() - 2, x.dim() - 1])]


def fixed(watch: Watch, call: Call, planes: Planes, dims: Sequence[int]) -> Planes:
    """Freeze and drop the planes that vary along ``dims``."""
    left = []
    for p in planes:
        if any(p.shape[d] > 1 for d in dims):
            watch.ledger.freeze(p, lambda: f"addressed by position in {call.where()}")
        else:
            left.append(p)
    return tuple(left)
