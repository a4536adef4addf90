"""Convolutions that write into the arena.

oneDNN's convolution with a sum: it adds to what its output holds, so the output is zeroed first, or holds the residual already.
A 1x1 convolution of many pixels is a matrix product, which also reads and writes slices of a concatenation. Where torch has no
oneDNN (another processor), a depthwise convolution is a sum of shifted products, and any other one of shifted matrix products.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gossamer.memory.kernels.pointwise import POINTWISE, same_place
from gossamer.memory.program import Step, View

Call = Callable[[], Any]
FEW_PIXELS, MANY_WEIGHTS = 200, 1 << 16
"""For fewer pixels and more weights than these, oneDNN's packed weights beat a matrix product."""


@cache
def onednn() -> bool:
    """Whether torch's oneDNN convolution with a sum is there."""
    if not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_convolution_pointwise_") and "binary" in torch.ops.mkldnn._convolution_pointwise_.overloads()


def dense_image(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether strides are those of a channels-last image without gaps."""
    bare = torch.empty_strided(tuple(shape), tuple(stride), device="meta")
    return bare.is_contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)


def _as_matrix(step: Step) -> bool:
    """Whether a 1x1 convolution runs as a matrix product: oneDNN takes it where it can write there and adds, or has many weights for few pixels."""
    if not step.options["matrix"]:
        return False
    x, out, accumulates = step.reads[0], step.writes[0], step.reads[3] is not None
    assert x is not None
    dense = dense_image(out.shape, out.stride) and dense_image(x.shape, x.stride)  # type: ignore[arg-type]
    pixels = out.shape[0] * out.shape[2] * out.shape[3]
    large = pixels < FEW_PIXELS and out.shape[1] * x.shape[1] > MANY_WEIGHTS
    return not (onednn() and dense and (accumulates or large))


def convolution_scratch(step: Step) -> int:
    """Bytes for the output without gaps where it goes into a slice."""
    if _as_matrix(step):
        return 0
    out = step.writes[0]
    return 0 if dense_image(out.shape, out.stride) else -(-out.bytes // 64) * 64


def convolution(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """Calls of a convolution; `gossamer.memory.kernels.bind` says what the arguments are."""
    x, w, b, residual = reads
    (out,) = writes
    if _as_matrix(step):
        return _matrix(step, x, w, b, residual, out)
    target = out
    if step.scratch:
        assert scratch is not None
        stride = torch.empty(out.shape, device="meta").to(memory_format=torch.channels_last).stride()
        target = scratch[: out.numel() * 4].view(torch.float32).as_strided(out.shape, stride)
    calls: list[Call] = []
    if residual is None:
        calls.append(lambda: target.zero_())
    elif not same_place(target, residual):
        calls.append(lambda: target.copy_(residual))
    act = step.options["act"]
    inside = onednn() and act is not None and act[0] == "relu"
    calls += _onednn(step, x, w, b, target, relu=inside) if onednn() else _shifted(step, x, w, b, target)
    return calls + _after(None if inside else act, target, out)


def folded(step: Step) -> Step:
    """The same step with the scale of a norm multiplied into its weight."""
    scale, (x, w, *rest) = step.options.get("scale"), step.reads
    if scale is None:
        return step
    assert isinstance(w, Tensor)
    weight = (w.double() * scale.double().view(-1, *[1] * (w.dim() - 1))).float()
    return replace(step.with_options(scale=None), reads=(x, weight, *rest))


def packed(step: Step) -> Step:
    """The same step with its weight as the kernel wants it, once for all arenas."""
    step = folded(step)
    x, w, *rest = step.reads
    if not isinstance(w, Tensor) or not isinstance(x, View) or _as_matrix(step) or not onednn():
        return step
    o = step.options
    if w.dim() == 4:
        w = torch.ops.mkldnn._reorder_convolution_weight(
            w.contiguous(), o["padding"], o["stride"], o["dilation"], o["groups"], list(x.shape)
        )
    return replace(step, reads=(x, w, *rest))


def _onednn(step: Step, x: Tensor, w: Tensor, b: Any, target: Tensor, *, relu: bool) -> list[Call]:
    """oneDNN's convolution that adds to what lies in its place."""
    o = step.options
    run = torch.ops.mkldnn._convolution_pointwise_.binary
    args: tuple[Any, ...] = (w, b, o["padding"], o["stride"], o["dilation"], o["groups"], "add", 1.0, "relu" if relu else None, [], None)
    return [lambda: run(target, x, *args)]


def _shifted(step: Step, x: Tensor, w: Tensor, b: Any, target: Tensor) -> list[Call]:
    """One product for each weight of the window, added where it falls; needs no memory."""
    o, dims = step.options, w.dim() - 2
    depthwise = o["groups"] == x.shape[1] == w.shape[0]
    calls: list[Call] = []
    for number, offset in enumerate(itertools.product(*(range(k) for k in w.shape[2:]))):
        goal, source = target, x
        for d in range(dims):
            shift, s = offset[d] * o["dilation"][d] - o["padding"][d], o["stride"][d]
            low = max(0, -(shift // s))
            high = min(target.shape[2 + d], (x.shape[2 + d] - 1 - shift) // s + 1)
            goal = goal.narrow(2 + d, low, max(0, high - low))
            start = low * s + shift
            source = torch.ops.aten.slice(source, 2 + d, start, start + max(0, high - low - 1) * s + 1, s)
        if not goal.numel():
            continue
        tap = w.flatten(2)[:, :, number]
        calls += [_product(goal, source, tap)] if depthwise else _rows(goal, source, tap, o["groups"])
    if b is not None:
        bias = b.view(1, -1, *[1] * dims)
        calls.append(lambda: target.add_(bias))
    return calls


def _product(goal: Tensor, source: Tensor, tap: Tensor) -> Call:
    """One tap of a depthwise window, added where it falls."""
    weight = tap.reshape(1, -1, *[1] * (goal.dim() - 2))
    return lambda: goal.addcmul_(source, weight)


def _rows(goal: Tensor, source: Tensor, tap: Tensor, groups: int) -> list[Call]:
    """Rows of pixels times one tap of the window, group by group."""
    calls: list[Call] = []
    out_width, in_width = goal.shape[1] // groups, source.shape[1] // groups
    for g in range(groups):
        weight = tap[g * out_width : (g + 1) * out_width].t()
        a = source[:, g * in_width : (g + 1) * in_width].movedim(1, -1)
        y = goal[:, g * out_width : (g + 1) * out_width].movedim(1, -1)
        for where in itertools.product(*(range(n) for n in a.shape[:-2])):
            calls.append(_add_product(y[where], a[where], weight))
    return calls


def _add_product(y: Tensor, a: Tensor, weight: Tensor) -> Call:
    """One row of pixels times one tap, added in place."""
    return lambda: y.addmm_(a, weight)


def _matrix(step: Step, x: Tensor, w: Tensor, b: Any, residual: Any, out: Tensor) -> list[Call]:
    """A 1x1 convolution as a product of pixels and weights, added to a residual where there is one."""
    pixels, target, weight = _pixels(x), _pixels(out), w.flatten(1).t()
    calls: list[Call] = []
    if residual is None:
        calls.append((lambda: torch.mm(pixels, weight, out=target)) if b is None else (lambda: torch.addmm(b, pixels, weight, out=target)))
    else:
        if not same_place(out, residual):
            calls.append(lambda: out.copy_(residual))
        calls.append(lambda: target.addmm_(pixels, weight))
        if b is not None:
            calls.append(lambda: target.add_(b))
    return calls + _after(step.options["act"], out, out)


def _pixels(x: Tensor) -> Tensor:
    """A channels-last image as a matrix of pixels by channels."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def _after(act: Any, source: Tensor, out: Tensor) -> list[Call]:
    """The activation, into the output; a copy where there is none and the result lies elsewhere."""
    if act is None:
        return [] if same_place(out, source) else [lambda: out.copy_(source)]
    name, args, kwargs = act
    run = POINTWISE[name]
    return [lambda: run(out, source, *args, **kwargs)]
