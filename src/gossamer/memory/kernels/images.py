"""Pooling, resampling, and patches of an image."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.memory.kernels.calls import Call, carve, room
from gossamer.memory.program import Step


def max_pool(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """The largest of shifted views: torch's own kernel needs eight bytes of indices for each output."""
    (x,), (out,) = reads, writes
    o = step.options
    calls: list[Call] = []
    for offset in itertools.product(*(range(k) for k in o["kernel"])):
        spans = []
        for d in (0, 1):
            shift = offset[d] * o["dilation"][d] - o["padding"][d]
            low = max(0, -(shift // o["stride"][d]))
            high = min(out.shape[2 + d], (x.shape[2 + d] - 1 - shift) // o["stride"][d] + 1)
            spans.append((low, high, shift))
        if any(low >= high for low, high, _ in spans):
            continue
        goal, source = out, x
        for d, (low, high, shift) in enumerate(spans):
            s = o["stride"][d]
            goal = goal.narrow(2 + d, low, high - low)
            start = low * s + shift
            source = torch.ops.aten.slice(source, 2 + d, start, start + (high - low - 1) * s + 1, s)
        calls.append(_larger(goal, source, whole=goal.shape == out.shape))
    first = next((c for c in calls if getattr(c, "whole", None) is not None), None)
    if first is None:
        return [lambda: out.fill_(-torch.inf), *calls]
    return [first.whole, *(c for c in calls if c is not first)]  # type: ignore[attr-defined]


def _larger(goal: Tensor, source: Tensor, *, whole: bool) -> Call:
    """The larger of two in place; ``whole`` offers a copy instead, for the first tap."""

    def run() -> None:
        torch.maximum(goal, source, out=goal)

    if whole:
        run.whole = lambda: goal.copy_(source)  # type: ignore[attr-defined]
    return run


def avg_pool(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """Average pooling."""
    args = step.options["args"]
    return _densely(step, reads, writes, scratch, lambda x, out: torch.ops.aten.avg_pool2d.out(x, *args, out=out))


def upsample(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """Resampling by torch's kernel of that name."""
    run, args = getattr(torch.ops.aten, step.options["op"]).out, step.options["args"]
    return _densely(step, reads, writes, scratch, lambda x, out: run(x, *args, out=out))


def _densely(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None, run: Callable[..., Any]) -> list[Call]:
    """A kernel that needs an output without gaps: through scratch where the output is a slice."""
    (x,), (out,) = reads, writes
    if not step.scratch:
        return [lambda: run(x, out)]
    (flat,) = carve(scratch, [(out.numel(),)])
    temporary = flat.as_strided(out.shape, torch.empty(out.shape, device="meta", memory_format=torch.channels_last).stride())
    return [lambda: run(x, temporary), lambda: out.copy_(temporary)]


def dense_scratch(step: Step) -> int:
    """Bytes of an output without gaps, where the output is a slice."""
    out = step.writes[0].meta()
    dense = out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)
    return 0 if dense else room(out.numel())


def patches(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """The same calls for each patch, on a window of the image, with pixels beyond the edge set in between."""
    from gossamer.memory.kernels.binding import Bound

    (image,), (out,), patch = reads, writes, step.options["inner"]
    assert scratch is not None
    bound = Bound(patch.program, step.options["lives"], step.options["offsets"], scratch)
    (window,), (result,) = bound.inputs, bound.outputs
    assert window is not None
    (source,) = patch.program.inputs
    calls: list[Call] = []
    for start in patch.starts:
        part, inside = window, image
        spans = zip(patch.windows[source.buffer], start, (2, 3), strict=True)
        for w, at, d in spans:
            low = w.scale * at + w.low
            first, last = max(0, low), min(image.shape[d], low + w.size)
            part, inside = part.narrow(d, first - low, last - first), inside.narrow(d, first, last - first)
        if part.shape != window.shape:
            calls.append(_filling(window, patch.fills.get(source.buffer, 0.0)))
        calls.append(_moving(part, inside))
        for each, own in zip(patch.program.steps, bound.calls, strict=True):
            calls += own
            written = each.writes[0]
            if written.buffer in patch.fills:
                whole = bound.tensor(written)
                parts = patch.beyond(written.buffer, start)
                calls += [_filling(whole.narrow(2 + axis, first, n), patch.fills[written.buffer]) for axis, first, n in parts]
        goal = out.narrow(2, start[0], result.shape[2]).narrow(3, start[1], result.shape[3])
        calls.append(_moving(goal, result))
    return calls


def _filling(part: Tensor, value: float) -> Call:
    """A call that sets a part to a value."""
    return lambda: part.fill_(value)


def _moving(goal: Tensor, source: Tensor) -> Call:
    """A call that copies one part to another."""
    return lambda: goal.copy_(source)
