"""A network as a list of steps that read and write views of buffers: what the planner orders, places and runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """Part of a buffer as a tensor: strides and offset in elements, as torch counts them."""

    buffer: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What the elements take, without gaps between them."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def meta(self) -> Tensor:
        """A tensor of this geometry without memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


Argument = View | Tensor | None
"""What a step reads: a view, or a weight or constant, which has its own memory."""


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        name: path of the module that computes it, or the name of the node in the captured graph.
        kernel: which kernel runs it (`gossamer.memory.kernels`).
        reads: what it reads, in the kernel's order.
        writes: what it writes; the first one may take over a buffer that ends here.
        into: indices of reads that the output may be written over, element by element.
        scratch: bytes in the arena that the kernel needs while it runs.
        outside: bytes it takes from the allocator while it runs, because torch has no kernel that writes where it is told.
        options: numbers and names of the kernel.
    """

    name: str
    kernel: str
    reads: tuple[Argument, ...]
    writes: tuple[View, ...]
    into: tuple[int, ...] = ()
    scratch: int = 0
    outside: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def with_options(self, **changes: Any) -> Step:
        """The same step with other options."""
        return replace(self, options={**self.options, **changes})

    def read_views(self) -> Iterator[View]:
        """The views among what it reads."""
        return (r for r in self.reads if isinstance(r, View))


@dataclass(frozen=True)
class Program:
    """Steps in an order that can be run.

    Attributes:
        steps: the operations.
        sizes: bytes of each buffer.
        inputs: views that the network's inputs are copied into, by position; None where an input is never read.
        outputs: views (or constants) that the network returns, in the order of its flattened output.
        keys: buffer -> name, ``"node:n"``.
        bases: name of a buffer -> shape and strides of the tensor it was made for.
    """

    steps: tuple[Step, ...]
    sizes: Mapping[int, int]
    inputs: tuple[View | None, ...]
    outputs: tuple[Any, ...]
    keys: Mapping[int, str]
    bases: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def used(self) -> set[int]:
        """Buffers that a step touches, or that are an input or output."""
        views = [v for s in self.steps for v in (*s.read_views(), *s.writes)]
        return {v.buffer for v in (*views, *(i for i in self.inputs if i), *(o for o in self.outputs if isinstance(o, View)))}

    def writers(self) -> dict[int, list[int]]:
        """Buffer -> indices of the steps that write it."""
        found: dict[int, list[int]] = {}
        for i, step in enumerate(self.steps):
            for view in step.writes:
                found.setdefault(view.buffer, []).append(i)
        return found

    def readers(self) -> dict[int, list[int]]:
        """Buffer -> indices of the steps that read it."""
        found: dict[int, list[int]] = {}
        for i, step in enumerate(self.steps):
            for b in {v.buffer for v in step.read_views()}:
                found.setdefault(b, []).append(i)
        return found

    def pinned(self) -> set[int]:
        """Buffers of the outputs, which live to the end."""
        return {o.buffer for o in self.outputs if isinstance(o, View)}


class Slot:
    """Stands for a step's n-th argument in a template of arguments."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"${self.index}"
