"""What lives when: lifetimes of buffers in an order of steps, outputs laid over inputs that end, and what no arena can be below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gossamer.memory.program import Program, Step, View


@dataclass(frozen=True)
class Life:
    """A stretch of memory that has to be kept.

    Attributes:
        name: of the buffer, or of the step whose scratch it is.
        buffers: the buffers that follow each other in it, each written over the one before.
        size: bytes, a multiple of the alignment.
        first, last: steps; -1 is before the first step, the number of steps is after the last.
        scratch: index of the step whose scratch it is, or None.
    """

    name: str
    buffers: tuple[int, ...]
    size: int
    first: int
    last: int
    scratch: int | None = None


def aligned(size: int, alignment: int) -> int:
    """A size rounded up to a multiple of the alignment.

    Examples:
        >>> aligned(100, 64), aligned(128, 64)
        (128, 128)
    """
    return -(-size // alignment) * alignment


def lives(program: Program, *, inplace: bool = True, alignment: int = 64) -> list[Life]:
    """Lifetimes in the program's order.

    Args:
        program: steps in the order they will run.
        inplace: whether an output may be written over an input of the same geometry that nothing reads afterwards.
        alignment: bytes.
    """
    first, last = spans(program)
    pinned = set(program.pinned())
    root = {b: b for b in first}
    for i, step in enumerate(program.steps if inplace else ()):
        taken = takes(step, program.sizes, first, i, root)
        for buffer in taken:
            a = root[buffer]
            if last[a] == i and a not in pinned:
                b = step.writes[0].buffer
                for k, v in root.items():
                    if v == b:
                        root[k] = a
                last[a] = last[b]
                if b in pinned:
                    pinned.add(a)
                break
    chains: dict[int, list[int]] = {}
    for b in sorted(root, key=lambda b: (first[b], b)):
        chains.setdefault(root[b], []).append(b)
    found = [
        Life(program.keys[a], tuple(bs), aligned(program.sizes[a], alignment), first[a], last[a])
        for a, bs in chains.items()
        if program.sizes[a]
    ]
    for i, step in enumerate(program.steps):
        if step.scratch:
            found.append(Life(f"{step.name} scratch", (), aligned(step.scratch, alignment), i, i, scratch=i))
    return found


def spans(program: Program) -> tuple[dict[int, int], dict[int, int]]:
    """First and last step of each buffer."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for view in program.inputs:
        if view is not None:
            first[view.buffer], last[view.buffer] = -1, -1
    for i, step in enumerate(program.steps):
        for v in (*step.writes, *step.read_views()):
            first.setdefault(v.buffer, i)
            last[v.buffer] = i
    for b in program.pinned():
        first.setdefault(b, -1)
        last[b] = len(program.steps)
    return first, last


def takes(step: Step, sizes: Mapping[int, int], first: Mapping[int, int], now: int, root: Mapping[int, int] | None = None) -> list[int]:
    """Buffers that a step's output could be written over, were this their last reader: the same elements in the same places."""
    if not step.into or len(step.writes) != 1:
        return []
    out = step.writes[0]
    if first[out.buffer] != now or out.offset or out.bytes != sizes[out.buffer]:
        return []
    found = []
    for i in step.into:
        view = step.reads[i]
        if not isinstance(view, View) or view.buffer == out.buffer or sizes[view.buffer] != sizes[out.buffer]:
            continue
        base = root[view.buffer] if root is not None else view.buffer
        reads = [(k, r) for k, r in enumerate(step.reads) if isinstance(r, View) and (root[r.buffer] if root else r.buffer) == base]
        same = all(
            k in step.into and (r.shape, r.stride, r.offset) == (out.shape, out.stride, 0) and r.dtype == out.dtype for k, r in reads
        )
        if same and view.buffer not in found:
            found.append(view.buffer)
    return found


def peak(found: Sequence[Life], steps: int) -> int:
    """The largest sum of sizes that live together: no arena in this order can be smaller.

    Examples:
        >>> peak([Life("a", (0,), 64, -1, 1), Life("b", (1,), 128, 0, 2), Life("c", (2,), 64, 2, 3)], 3)
        192
    """
    return max(profile(found, steps), default=0)


def profile(found: Sequence[Life], steps: int) -> list[int]:
    """Bytes that live at each moment, from before the first step to after the last."""
    change = [0] * (steps + 3)
    for life in found:
        change[life.first + 1] += life.size
        change[life.last + 2] -= life.size
    total, out = 0, []
    for c in change[: steps + 2]:
        total += c
        out.append(total)
    return out
