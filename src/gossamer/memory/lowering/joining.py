"""Concatenation by construction: what makes a part writes it into its slice, and the concatenation itself costs nothing."""

from __future__ import annotations

from collections.abc import Collection

from gossamer.memory.lowering.strides import channels_last_strides
from gossamer.memory.program import Program, View

Home = tuple[str, tuple[int, ...], tuple[int, ...], int]


def homes(program: Program, *, leave: Collection[str] = ()) -> dict[str, Home]:
    """Buffers that can be made in their place in a concatenation.

    The last concatenation decides, so that in a chain of growing ones (DenseNet) all but the last are views of it.

    Args:
        program: as first recorded, with every concatenation a copy.
        leave: concatenations that are not to be built so.

    Returns:
        Name of a buffer -> name, shape and strides of the concatenation's buffer, and the offset in it in elements.
    """
    found: dict[str, tuple[str, int, int]] = {}
    inputs = {i.buffer for i in program.inputs if i is not None} | program.pinned()
    for step in reversed(program.steps):
        joins = step.options.get("joins")
        source = step.reads[0] if step.reads else None
        if joins is None or not isinstance(source, View) or joins in leave or source.buffer in inputs:
            continue
        key = program.keys[source.buffer]
        shape, stride = program.bases[key]
        slab_shape, slab_stride = program.bases[joins]
        whole = (source.shape, source.stride, source.offset) == (shape, stride, 0)
        images = len(shape) in (4, 5) and step.options["dim"] == 1
        if whole and images and stride == channels_last_strides(shape) and slab_stride == channels_last_strides(slab_shape):
            found.setdefault(key, (joins, step.options["dim"], step.options["start"]))
    return {key: home for key in found if (home := _resolve(key, found, program)) is not None}


def _resolve(key: str, found: dict[str, tuple[str, int, int]], program: Program) -> Home | None:
    """Where a part lies in the outermost concatenation; None where concatenations go round in a circle."""
    start = 0
    seen = {key}
    while key in found:
        key, _, more = found[key]
        start += more
        if key in seen:
            return None
        seen.add(key)
    shape, stride = program.bases[key]
    return key, shape, stride, start * stride[1]
