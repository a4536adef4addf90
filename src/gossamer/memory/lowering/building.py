"""From a captured graph to a finished program: recorded, joined, fused, ordered."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import fx

from gossamer.memory.kernels import scratch_bytes
from gossamer.memory.liveness import lives, peak
from gossamer.memory.lowering.fusing import fuse
from gossamer.memory.lowering.joining import homes
from gossamer.memory.lowering.recording import record
from gossamer.memory.program import Program, View


def build(graph: fx.GraphModule, inputs: list[Any], *, inplace: bool = True) -> tuple[Program, int]:
    """The program of a captured graph, and the bytes of all its tensors without any sharing.

    Concatenations are built by construction unless copying them takes less memory: a concatenation's whole buffer lives from the first
    part that is made.
    """
    plain = record(graph, inputs)
    naive = sum(plain.sizes.values())
    copying = finished(plain)
    found = homes(plain)
    if not found:
        return copying, naive
    return _best_join(graph, inputs, plain, copying, inplace), naive


def _best_join(graph: fx.GraphModule, inputs: list[Any], plain: Program, copying: Program, inplace: bool) -> Program:
    """The program with those concatenations made in place that lower the peak: all, all but those that live at the worst moment, or none."""

    def height(program: Program) -> int:
        """Bytes that live together at the worst moment of a program."""
        return peak(lives(program, inplace=inplace), len(program.steps))

    def joined(leave: Collection[str]) -> Program:
        """The program with every concatenation in place but those named."""
        return finished(record(graph, inputs, homes=homes(plain, leave=leave)))

    best = joined(())
    lowest, least = height(best), height(copying)
    if lowest <= least:
        return best
    leave: set[str] = set()
    for _ in range(3):
        found = lives(best, inplace=inplace)
        slabs = {slab for slab, *_ in homes(plain, leave=leave).values()}
        at = _moment(found, len(best.steps))
        there = [x for x in found if x.buffers and x.first <= at <= x.last and best.keys[x.buffers[0]] in slabs] if found else []
        if not there:
            break
        leave |= {best.keys[x.buffers[0]] for x in there}
        trial = joined(leave)
        best = trial if height(trial) < height(best) else best
        if height(best) <= least:
            return best
    return best if height(best) <= least else copying


def _moment(found: Any, steps: int) -> int:
    """The step at which most bytes live."""
    from gossamer.memory.liveness import profile

    bytes_at = profile(found, steps)
    return bytes_at.index(max(bytes_at)) - 1


def finished(program: Program) -> Program:
    """Fused, without steps that nothing reads, each with its scratch."""
    fused = fuse(program)
    wanted = {o.buffer for o in fused.outputs if isinstance(o, View)}
    kept = []
    for step in reversed(fused.steps):
        if any(w.buffer in wanted for w in step.writes):
            wanted |= {v.buffer for v in step.read_views()}
            kept.append(replace(step, scratch=scratch_bytes(step)))
    return replace(fused, steps=tuple(reversed(kept)))
