"""A program's tensors at their addresses in one piece of memory, and the calls that run its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.memory.kernels.builders import bind
from gossamer.memory.liveness import Life
from gossamer.memory.program import Program, View


class Bound:
    """A program in memory.

    Attributes:
        inputs, outputs: tensors in the memory (a constant output as it is; None for an input that is never read).
        calls: for each step, the calls that run it.
    """

    def __init__(self, program: Program, lives: Sequence[Life], offsets: Sequence[int], memory: Tensor) -> None:
        self._sizes, self._memory = program.sizes, memory
        self._at: dict[int, int] = {}
        scratch: dict[int, Tensor] = {}
        for life, offset in zip(lives, offsets, strict=True):
            self._at.update(dict.fromkeys(life.buffers, offset))
            if life.scratch is not None:
                scratch[life.scratch] = memory[offset : offset + life.size]
        self.inputs = [None if v is None else self.tensor(v) for v in program.inputs]
        self.outputs: list[Any] = [self.tensor(v) if isinstance(v, View) else v for v in program.outputs]
        self.calls: list[list[Callable[[], Any]]] = []
        with torch.no_grad():
            for i, step in enumerate(program.steps):
                reads = [self.tensor(r) if isinstance(r, View) else r for r in step.reads]
                self.calls.append(bind(step, reads, [self.tensor(w) for w in step.writes], scratch.get(i)))

    def tensor(self, view: View) -> Tensor:
        """A view as a tensor in the memory."""
        size = self._sizes[view.buffer]
        if not size:
            return torch.empty_strided(view.shape, view.stride, dtype=view.dtype)
        start = self._at[view.buffer]
        flat = self._memory[start : start + size].view(view.dtype)
        return flat.as_strided(view.shape, view.stride, flat.storage_offset() + view.offset)
