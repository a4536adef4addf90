"""Steps that can be one: a norm folded into its convolution, a sum accumulated by the convolution that makes one side, an activation
applied where the convolution writes, and a norm before a pointwise convolution done in strips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from gossamer.memory.kernels.convolutions import folded
from gossamer.memory.program import Program, Slot, Step, View

ACTIVATIONS = frozenset(
    {"relu", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh", "elu", "leaky_relu", "clamp", "clamp_min", "mish", "softplus"}
)  # fmt: skip


def fuse(program: Program, *, strips: bool = True) -> Program:
    """The program with fewer steps; what it computes is the same up to rounding."""
    passes: list[Callable[[_Steps], None]] = [_fold_norms, _accumulate_sums, _apply_activations]
    if strips:
        passes.append(_strip)
    work = _Steps(program)
    for each in passes:
        each(work)
    return replace(program, steps=tuple(s for s in work.steps if s is not None))


class _Steps:
    """Steps while they are changed: a step that went into another one is None."""

    def __init__(self, program: Program) -> None:
        self.steps: list[Step | None] = list(program.steps)
        self.writers, self.readers, self._pinned = program.writers(), program.readers(), program.pinned()
        self.inputs = {i.buffer for i in program.inputs if i is not None}

    def maker(self, view: Any, reader: int, kernel: str) -> int | None:
        """The step of this kind that makes a view which step ``reader`` alone reads, and nothing else of that buffer."""
        if not isinstance(view, View) or view.buffer in self._pinned or self.readers.get(view.buffer) != [reader]:
            return None
        writers = self.writers.get(view.buffer, [])
        if len(writers) != 1:
            return None
        step = self.steps[writers[0]]
        return writers[0] if step is not None and step.kernel == kernel and step.writes == (view,) else None

    def merge(self, into: int, gone: int, step: Step) -> None:
        """Step ``into`` becomes ``step``, which does what ``gone`` did too."""
        old = self.steps[gone]
        assert old is not None
        self.steps[into], self.steps[gone] = step, None
        for view in old.writes:
            self.writers[view.buffer] = sorted(into if w == gone else w for w in self.writers[view.buffer])
        for view in old.read_views():
            self.readers[view.buffer] = sorted({into if r == gone else r for r in self.readers[view.buffer]})

    def ready_before(self, view: View, step: int) -> bool:
        """Whether a buffer is complete before a step."""
        return all(w < step for w in self.writers.get(view.buffer, []))


def _fold_norms(work: _Steps) -> None:
    """Multiply the scale of a norm into the convolution before it."""
    for i, step in enumerate(work.steps):
        if step is None or step.kernel != "affine":
            continue
        at = work.maker(step.reads[0], i, "convolution")
        conv = work.steps[at] if at is not None else None
        if at is None or conv is None or "scale" in conv.options or conv.reads[3] is not None or conv.options["act"] is not None:
            continue
        x, w, b, _ = conv.reads
        scale, shift = (t.flatten() for t in step.reads[1:] if isinstance(t, Tensor))
        assert isinstance(w, Tensor)
        bias = shift if b is None else b * scale + shift  # type: ignore[operator]
        scaled = conv.with_options(scale=scale)  # the weight itself is multiplied when the plan is compiled
        work.merge(at, i, replace(scaled, reads=(x, w, bias, None), writes=step.writes))


def _accumulate_sums(work: _Steps) -> None:
    """Let a convolution add to the other operand of a sum, where that is complete before it."""
    for i, step in enumerate(work.steps):
        if step is None or not _is_sum(step):
            continue
        makers = [(at, k) for k in (0, 1) if (at := work.maker(step.reads[k], i, "convolution")) is not None]
        for at, k in sorted(makers, reverse=True):
            conv, other = work.steps[at], step.reads[1 - k]
            assert conv is not None and isinstance(other, View)
            if conv.reads[3] is None and conv.options["act"] is None and work.ready_before(other, at) and len(conv.writes[0].shape) == 4:
                work.merge(at, i, replace(conv, reads=(*conv.reads[:3], other), writes=step.writes))
                break


def _is_sum(step: Step) -> bool:
    """Whether a step adds two tensors of one shape and type."""
    if step.kernel != "pointwise" or step.options["op"] != "add" or len(step.reads) != 2:
        return False
    (args, kwargs), (a, b) = step.options["template"], step.reads
    views = isinstance(a, View) and isinstance(b, View) and a.shape == b.shape and a.dtype == b.dtype == step.writes[0].dtype
    return views and len(args) == 2 and kwargs.get("alpha", 1) == 1


def _apply_activations(work: _Steps) -> None:
    """Let a convolution or norm apply the activation that alone reads it."""
    for i, step in enumerate(work.steps):
        if step is None or step.kernel != "pointwise" or step.options["op"] not in ACTIVATIONS or len(step.reads) != 1:
            continue
        for kernel in ("convolution", "affine"):
            at = work.maker(step.reads[0], i, kernel)
            before = work.steps[at] if at is not None else None
            if at is not None and before is not None and before.options["act"] is None and isinstance(step.options["template"][0][0], Slot):
                (_, *args), kwargs = step.options["template"]
                act = (step.options["op"], tuple(args), dict(kwargs))
                work.merge(at, i, replace(before.with_options(act=act), writes=step.writes))


def _strip(work: _Steps) -> None:
    """A norm and activation that only a pointwise convolution reads: done for some pixels at a time, into scratch."""
    for i, step in enumerate(work.steps):
        if step is None or step.kernel != "convolution" or not step.options["matrix"] or step.reads[3] is not None:
            continue
        at = work.maker(step.reads[0], i, "affine")
        norm = work.steps[at] if at is not None else None
        if at is None or norm is None:
            continue
        options = {"act": step.options["act"], "norm_act": norm.options["act"]}
        reads = (*norm.reads, *folded(step).reads[1:3])
        fused = Step(step.name, "strips", reads, step.writes, options=options)
        work.merge(i, at, fused)
        x = norm.reads[0]
        assert isinstance(x, View)
