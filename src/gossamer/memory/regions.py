"""Which pixels a patch needs: from a patch of a stage's result back through its steps to the network's input.

Every tensor of a stage is computed for one window of pixels, the same size for each patch, that may reach over the edge of the image;
pixels beyond the edge are then set to what the next step pads with. So no step pads, and all patches share one program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from gossamer.memory.kernels import scratch_bytes
from gossamer.memory.liveness import lives, peak
from gossamer.memory.lowering.strides import channels_last_strides
from gossamer.memory.program import Argument, Program, Step, View

FREE = None  # nothing looks at pixels beyond the edge


@dataclass(frozen=True)
class Stage:
    """Steps from the input image to one tensor, with nothing else that goes in or out."""

    steps: tuple[Step, ...]
    image: View
    result: View


@dataclass(frozen=True)
class Window:
    """Pixels of a tensor that a patch needs along one axis: ``scale * start + low`` and the ``size - 1`` after it."""

    scale: int
    low: int
    size: int

    def joined(self, other: Window | None) -> Window | None:
        """The smallest window with both; None where they move differently."""
        if other is None:
            return self
        if other.scale != self.scale:
            return None
        low = min(self.low, other.low)
        return Window(self.scale, low, max(self.low + self.size, other.low + other.size) - low)


@dataclass(frozen=True)
class PatchProgram:
    """The program of one patch.

    Attributes:
        program: steps on windows; its input is a window of the image, its output one patch of the result.
        starts: first row and column of each patch of the result.
        windows: buffer -> windows along height and width, of buffers that are looked at beyond the edge.
        fills: buffer -> what pixels beyond the edge hold.
        extents: buffer -> height and width of the whole tensor.
    """

    program: Program
    starts: tuple[tuple[int, int], ...]
    windows: dict[int, tuple[Window, Window]]
    fills: dict[int, float]
    extents: dict[int, tuple[int, int]] = field(default_factory=dict)

    def beyond(self, buffer: int, start: tuple[int, int]) -> list[tuple[int, int, int]]:
        """Parts of a buffer beyond the edge in one patch: ``(axis, first, count)``."""
        found = []
        for axis, (window, whole, at) in enumerate(zip(self.windows[buffer], self.extents[buffer], start, strict=True)):
            low = window.scale * at + window.low
            if low < 0:
                found.append((axis, 0, min(-low, window.size)))
            if low + window.size > whole:
                first = max(0, whole - low)
                found.append((axis, first, window.size - first))
        return found


def macs(step: Step) -> int:
    """Multiply-adds of a step's contraction, 0 where it has none."""
    if step.kernel in ("convolution", "strips"):
        w = step.reads[1] if step.kernel == "convolution" else step.reads[3]
        assert isinstance(w, torch.Tensor)
        return step.writes[0].bytes // 4 * w[0].numel()
    if step.kernel == "matrix":
        a = step.reads[0]
        assert a is not None
        return step.writes[0].bytes // 4 * a.shape[-1]
    if step.kernel == "attention":
        q, k = step.reads[0], step.reads[1]
        assert q is not None and k is not None
        return 2 * torch.Size(q.shape).numel() * k.shape[2]
    return 0


def stages(program: Program) -> Iterator[Stage]:
    """Every stage at the start of the program that can run patch by patch, the shortest first."""
    images = [v for v in program.inputs if v is not None]
    if len(images) != 1 or len(images[0].shape) != 4 or not _whole(images[0], program):
        return
    image, readers = images[0], program.readers()
    done: set[int] = set()
    for i, step in enumerate(program.steps):
        views = [*step.read_views(), *step.writes]
        if not _local(step) or not all(len(v.shape) == 4 and _whole(v, program) for v in views):
            return
        done |= {v.buffer for v in step.writes}
        result = step.writes[0]
        last = {b: max(readers.get(b, [i])) for b in done | {image.buffer}}
        others = [b for b in last if b != result.buffer and (last[b] > i or b in program.pinned())]
        if not others and result.shape[2] > 1 and any(s.kernel != "pointwise" for s in program.steps[: i + 1]):
            yield Stage(program.steps[: i + 1], image, result)


def _whole(view: View, program: Program) -> bool:
    """Whether a view is all of its buffer, as a channels-last image."""
    return view.offset == 0 and view.bytes == program.sizes[view.buffer] and view.stride == channels_last_strides(view.shape)


def _local(step: Step) -> bool:
    """Whether each pixel of the output needs a window of the input only."""
    if step.outside:
        return False
    if step.kernel in ("convolution", "max_pool", "affine", "strips"):
        return True
    if step.kernel == "avg_pool":
        _, _, padding, ceil_mode, counts_padding, divisor = step.options["args"]
        return not ceil_mode and (counts_padding or not any(padding)) and divisor is None
    if step.kernel in ("pointwise", "copy"):
        out = step.writes[0]
        constants = [t for t in step.reads if isinstance(t, torch.Tensor)]
        flat = all(t.dim() < 3 or all(n == 1 for n in t.shape[-2:]) for t in constants) and all(
            t.dim() != 2 and t.dim() != 1 for t in constants
        )
        return flat and all(v.shape[2:] == out.shape[2:] for v in step.read_views())
    return False


def _looks(step: Step, k: int, axis: int) -> tuple[int, int, int, float | None]:
    """Stride, padding, reach of the window, and what is padded with, of a step's k-th read along an axis."""
    o = step.options
    if step.kernel == "convolution" and k == 0:
        w = step.reads[1]
        assert isinstance(w, torch.Tensor)
        reach = (w.shape[2 + axis] - 1) * o["dilation"][axis] + 1
        return o["stride"][axis], o["padding"][axis], reach, 0.0
    if step.kernel == "max_pool":
        return o["stride"][axis], o["padding"][axis], (o["kernel"][axis] - 1) * o["dilation"][axis] + 1, -torch.inf
    if step.kernel == "avg_pool":
        kernel, stride, padding, *_ = o["args"]
        return stride[axis], padding[axis], kernel[axis], 0.0
    return 1, 0, 1, FREE


def patch_program(stage: Stage, grid: tuple[int, int]) -> PatchProgram | None:
    """The program of one patch of a grid; None where windows of a tensor move differently for different readers."""
    size = [-(-n // g) for n, g in zip(stage.result.shape[2:], grid, strict=True)]
    windows: dict[int, tuple[Window, Window]] = {stage.result.buffer: (Window(1, 0, size[0]), Window(1, 0, size[1]))}
    fills: dict[int, float] = {}
    needs: list[dict[int, tuple[Window, Window]]] = []
    for step in reversed(stage.steps):
        out = windows.get(step.writes[0].buffer)
        if out is None:
            return None
        own: dict[int, tuple[Window, Window]] = {}
        for k, view in enumerate(step.reads):
            if not isinstance(view, View):
                continue
            needed = []
            for axis in (0, 1):
                stride, padding, reach, fill = _looks(step, k, axis)
                w = out[axis]
                needed.append(Window(w.scale * stride, w.low * stride - padding, (w.size - 1) * stride + reach))
                if fill is not None and (reach > 1 or padding) and fills.setdefault(view.buffer, fill) != fill:
                    return None
            own[k] = (needed[0], needed[1])
            before = windows.get(view.buffer)
            joined = [n.joined(before[axis] if before else None) for axis, n in enumerate(needed)]
            if joined[0] is None or joined[1] is None:
                return None
            windows[view.buffer] = (joined[0], joined[1])
        needs.append(own)
    needs.reverse()
    starts = [[min(i * s, n - s) for i in range(-(-n // s))] for n, s in zip(stage.result.shape[2:], size, strict=True)]
    if (len(starts[0]), len(starts[1])) != grid:
        return None
    program, extents = _windowed(stage, windows, needs)
    return PatchProgram(program, tuple((y, x) for y in starts[0] for x in starts[1]), windows, fills, extents)


def _windowed(
    stage: Stage, windows: dict[int, tuple[Window, Window]], needs: list[dict[int, tuple[Window, Window]]]
) -> tuple[Program, dict[int, tuple[int, int]]]:
    """The stage's steps on windows, without padding."""
    shapes = {v.buffer: v for s in stage.steps for v in (*s.read_views(), *s.writes)}
    views = {b: _dense(b, (*v.shape[:2], windows[b][0].size, windows[b][1].size), v.dtype) for b, v in shapes.items()}
    sizes = {b: v.bytes for b, v in views.items()}
    extents = {b: (v.shape[2], v.shape[3]) for b, v in shapes.items()}
    keys = {b: f"patch:{b}" for b in views}
    steps: list[Step] = []
    for step, own in zip(stage.steps, needs, strict=True):
        reads: list[Argument] = []
        for k, r in enumerate(step.reads):
            if not isinstance(r, View):
                reads.append(r)
                continue
            part = _part(views[r.buffer], windows[r.buffer], own[k])
            if part.shape != views[r.buffer].shape and step.kernel in ("convolution", "avg_pool", "strips") and k == 0:
                number = max(views) + 1
                views[number] = _dense(number, part.shape, part.dtype)
                sizes[number], keys[number] = views[number].bytes, f"patch:{number}"
                steps.append(Step(step.name, "copy", (part,), (views[number],)))
                part = views[number]
            reads.append(part)
        options = dict(step.options)
        if "padding" in options:
            options["padding"] = [0, 0]
        if step.kernel == "avg_pool":
            kernel, stride, _, *rest = options["args"]
            options["args"] = (kernel, stride, [0, 0], *rest)
        done = replace(step, reads=tuple(reads), writes=(views[step.writes[0].buffer],), options=options)
        steps.append(replace(done, scratch=scratch_bytes(done)))
    return Program(tuple(steps), sizes, (views[stage.image.buffer],), (views[stage.result.buffer],), keys, {}), extents


def _dense(buffer: int, shape: tuple[int, ...], dtype: torch.dtype) -> View:
    """All of a buffer, as a channels-last image."""
    return View(buffer, shape, channels_last_strides(shape), 0, dtype)


def _part(view: View, have: tuple[Window, Window], want: tuple[Window, Window]) -> View:
    """The wanted part of a window."""
    y, x = want[0].low - have[0].low, want[1].low - have[1].low
    shape = (*view.shape[:2], want[0].size, want[1].size)
    return View(view.buffer, shape, view.stride, view.offset + y * view.stride[2] + x * view.stride[3], view.dtype)


def cut(program: Program, stage: Stage, grid: tuple[int, int], inplace: bool) -> Program:
    """The program with a stage as one step."""
    from gossamer.memory.arena import place

    inner = patch_program(stage, grid)
    assert inner is not None
    found = lives(inner.program, inplace=inplace)
    placed = place(found, peak(found, len(inner.program.steps)))
    options = {"inner": inner, "lives": tuple(found), "offsets": placed.offsets, "grid": grid}
    step = Step(stage.steps[-1].name, "patches", (stage.image,), (stage.result,), scratch=placed.size, options=options)
    return replace(program, steps=(step, *program.steps[len(stage.steps) :]))
