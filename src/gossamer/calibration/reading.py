"""Calibration batches for many sweeps: read once where they fit in memory, and laid out as convolutions run fastest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gossamer.profiling.runtime import evaluating
from gossamer.sources.batches import Batch, split

HOLD_BYTES = 2**29
"""Batches are kept up to this size; what comes after is read again in every sweep."""


class Batches:
    """Calibration batches taken apart, to be swept over many times.

    Examples:
        >>> reads = []
        >>> class Source:
        ...     def __iter__(self):
        ...         reads.append(1)
        ...         return iter([torch.zeros(2, 3, 4, 4)])
        >>> batches = Batches(Source(), (torch.zeros(1, 3, 4, 4),), nn.Conv2d(3, 4, 3))
        >>> [len(list(batches)) for _ in range(3)], len(reads)
        ([1, 1, 1], 1)

    Args:
        source: batches, readable again and again.
        example_inputs: tells inputs from targets.
        model: takes channels-last inputs or not, which is tried on the first batch.
    """

    def __init__(self, source: Iterable[Any], example_inputs: Any, model: nn.Module) -> None:
        self._source, self._example_inputs, self._model = source, example_inputs, model
        self._held: list[Batch] | None = None
        begun = iter(source)  # the layout is tried now: later a caller's hooks would see it
        first = [split(raw, example_inputs) for raw in islice(begun, 1)]
        self._channels_last = bool(first) and self._takes_channels_last(first[0])
        self._begun: Iterator[Batch] | None = chain(first, (split(raw, example_inputs) for raw in begun))

    def __iter__(self) -> Iterator[Batch]:
        if self._held is not None:
            yield from self._held
            return
        held: list[Batch] | None = []
        size = 0
        begun, self._begun = self._begun, None
        for found in begun if begun is not None else (split(raw, self._example_inputs) for raw in self._source):
            batch = _channels_last(found) if self._channels_last else found
            size += sum(t.numel() * t.element_size() for t in pytree.tree_leaves(tuple(batch)) if isinstance(t, Tensor))
            held = [*held, batch] if held is not None and size <= HOLD_BYTES else None
            yield batch
        self._held = held

    def _takes_channels_last(self, batch: Batch) -> bool:
        if not any(isinstance(m, nn.Conv2d) for m in self._model.modules()):
            return False
        with evaluating(self._model):
            try:
                laid_out = _channels_last(batch)
                self._model(*laid_out.args, **laid_out.kwargs)
            except RuntimeError:  # a view of what it takes to be contiguous
                return False
        return True


def _channels_last(batch: Batch) -> Batch:
    def one(leaf: Any) -> Any:
        return leaf.contiguous(memory_format=torch.channels_last) if isinstance(leaf, Tensor) and leaf.dim() == 4 else leaf

    return Batch(*pytree.tree_map(one, tuple(batch)))
