"""Kernels that write where they are told and take nothing from the allocator; scratch they need comes from the arena.

A builder takes a step and its tensors and returns the calls that a run makes, in order. Everything that can be decided once
(views, packed weights, loop bounds) is decided there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gossamer.memory.kernels.calls import Call, activation
from gossamer.memory.kernels.contractions import attention, attention_scratch, matrix, norm, norm_scratch, strips, strips_scratch
from gossamer.memory.kernels.convolutions import convolution, convolution_scratch
from gossamer.memory.kernels.images import avg_pool, dense_scratch, max_pool, patches, upsample
from gossamer.memory.kernels.pointwise import POINTWISE, same_place
from gossamer.memory.program import Slot, Step

Builder = Callable[[Step, Sequence[Any], Sequence[Tensor], Tensor | None], list[Call]]


def scratch_bytes(step: Step) -> int:
    """What a step needs in the arena while it runs, beside what it reads and writes."""
    rule = _SCRATCH.get(step.kernel)
    return rule(step) if rule is not None else 0


def bind(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """The calls that run a step on these tensors.

    Args:
        step: what to do.
        reads, writes: tensors in the arena, or constants, in the step's order.
        scratch: ``step.scratch`` bytes, or None where it needs none.
    """
    return BUILDERS[step.kernel](step, reads, writes, scratch)


def _copy(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """A copy; nothing where the input lies there already."""
    (x,), (out,) = reads, writes
    return [] if same_place(out, x) and out.dtype == x.dtype else [lambda: out.copy_(x)]


def _fill(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """One value everywhere."""
    value, (out,) = step.options["value"], writes
    return [lambda: out.fill_(value)]


def _pointwise(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """An operation element by element, by its name in `POINTWISE`."""
    args, kwargs = _filled(step.options["template"], reads)
    run, (out,) = POINTWISE[step.options["op"]], writes
    return [lambda: run(out, *args, **kwargs)]


def _filled(template: Any, reads: Sequence[Any]) -> Any:
    """Arguments with each slot replaced by the tensor that it stands for."""
    return pytree.tree_map(lambda v: reads[v.index] if isinstance(v, Slot) else v, template)


def _affine(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """A folded norm: ``x * scale + shift``, and its activation in place."""
    (x, scale, shift), (out,) = reads, writes
    calls: list[Call] = [lambda: torch.addcmul(shift, x, scale, out=out)]
    return calls + (activation(step.options["act"], out, out) if step.options["act"] is not None else [])


def _reduce(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """A sum, mean, norm or extreme over dimensions."""
    (x,), (out,) = reads, writes
    dims, keep = step.options["dims"], step.options["keepdim"]
    kernel = torch.linalg.vector_norm if step.options["op"] == "vector_norm" else getattr(torch, step.options["op"])
    return [lambda: kernel(x, dim=dims, keepdim=keep, out=out)]


def _softmax(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """A softmax over one dimension."""
    (x,), (out,), dim = reads, writes, step.options["dim"]
    return [lambda: torch.ops.aten._softmax.out(x, dim, False, out=out)]


def _index_select(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """Rows of a table, or slices along one dimension."""
    (x, index), (out,), dim = reads, writes, step.options["dim"]
    return [lambda: torch.index_select(x, dim, index, out=out)]


def _as_it_is(step: Step, reads: Sequence[Any], writes: Sequence[Tensor], scratch: Tensor | None) -> list[Call]:
    """An operation without a kernel here: torch allocates its outputs, which are then copied into the arena."""
    func = step.options["func"]
    args, kwargs = _filled(step.options["template"], reads)

    def run() -> None:
        made = [t for t in pytree.tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
        for out, value in zip(writes, made, strict=True):
            out.copy_(value)

    return [run]


BUILDERS: dict[str, Builder] = {
    "affine": _affine,
    "as_it_is": _as_it_is,
    "attention": attention,
    "avg_pool": avg_pool,
    "convolution": convolution,
    "copy": _copy,
    "fill": _fill,
    "index_select": _index_select,
    "matrix": matrix,
    "max_pool": max_pool,
    "norm": norm,
    "patches": patches,
    "pointwise": _pointwise,
    "reduce": _reduce,
    "softmax": _softmax,
    "strips": strips,
    "upsample": upsample,
}


ALLOCATION_FREE = frozenset(BUILDERS) - {"as_it_is"}


KERNEL_BYTES = 32 << 10


_SCRATCH: dict[str, Callable[[Step], int]] = {
    "attention": attention_scratch,
    "avg_pool": dense_scratch,
    "convolution": convolution_scratch,
    "norm": norm_scratch,
    "strips": strips_scratch,
    "upsample": dense_scratch,
}
