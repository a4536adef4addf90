"""A process's part of every batch: contiguous, none twice, none left out."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler

from gossamer.errors import UsageError
from gossamer.result import ExampleInputs
from gossamer.training.feeding import Part, mix, samples_of, seed_epoch, seed_torch, take_apart


def bounds(n: int, rank: int, ranks: int) -> tuple[int, int]:
    """Where a process's part of ``n`` samples begins and ends; the first ones have one more where it does not divide.

    Examples:
        >>> [bounds(5, rank, 3) for rank in range(3)]
        [(0, 2), (2, 4), (4, 5)]
    """
    each, more = divmod(n, ranks)
    return rank * each + min(rank, more), (rank + 1) * each + min(rank + 1, more)


def part_of(raw: Any, rank: int, ranks: int, example_inputs: ExampleInputs = None) -> Part:
    """A process's part of a batch that every process has in full.

    Examples:
        >>> part = part_of((torch.arange(5), torch.arange(5) * 10), 1, 2)
        >>> part.raw, part.n, part.total
        ((tensor([3, 4]), tensor([30, 40])), 2, 5)

    Args:
        raw: a batch; its tensors with one row a sample are cut, all else stays.
        rank, ranks: the process, of how many.
        example_inputs: as for `gossamer.fit`.
    """
    total = samples_of(take_apart(raw, example_inputs))
    first, end = bounds(total, rank, ranks)
    cut = slice(first, end) if end > first else slice(0, 1)

    def one(leaf: Any) -> Any:
        return leaf[cut] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == total else leaf

    return Part(pytree.tree_map(one, raw), end - first, total)


class Shared:
    """Batches of which this process reads its part, in an order that all processes agree on.

    A plain DataLoader reads the samples of the part alone, with its workers too. Of other data each process reads every batch, and cuts it;
    random numbers that torch draws meanwhile are then the same in all processes, as in one.

    Args:
        data: as for `gossamer.fit`.
        rank, ranks: the process, of how many.
        example_inputs: of `gossamer.fit`.
        agree: called with a number that must be the same in all processes.

    Raises:
        UsageError: a DataLoader that divides the data already.
    """

    def __init__(
        self,
        data: Iterable[Any],
        rank: int,
        ranks: int,
        *,
        example_inputs: ExampleInputs = None,
        agree: Callable[[int], None] | None = None,
    ) -> None:
        if isinstance(getattr(data, "sampler", None), DistributedSampler):
            raise UsageError("the loader has a DistributedSampler, and parallel divides each batch itself: give a plain DataLoader")
        self.data, self.rank, self.ranks, self.example_inputs, self._agree = data, rank, ranks, example_inputs, agree
        self._parts = _Parts(rank, ranks)
        self._generator = torch.Generator()
        self._loader = _loader(data, self._parts, self._generator)
        self._reading: Tensor | None = None

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def seed(self, seed: int, epoch: int, device: torch.device) -> None:
        """Seed the order of an epoch, the same in all processes, and all other random numbers, which differ."""
        seed_epoch(self.data, seed, epoch, device)
        if self._loader is not None:
            self._draw_order()
        else:
            self._reading = torch.get_rng_state()
        self._generator.manual_seed(mix(seed, epoch, self.rank))
        seed_torch(mix(seed, epoch, self.rank), device)

    def __iter__(self) -> Iterator[Part]:
        return self._of_loader() if self._loader is not None else self._of_batches()

    def _draw_order(self) -> None:
        drawing = DataLoader(_Indices(), batch_sampler=self.data.batch_sampler, collate_fn=list, generator=self.data.generator)  # type: ignore[attr-defined]
        self._parts.order = list(drawing)  # by a loader of indices, which draws from the generator as the loader itself would
        self._parts.drawn = True
        if self._agree is not None:
            self._agree(zlib.crc32(repr(self._parts.order).encode()))

    def _of_loader(self) -> Iterator[Part]:
        assert self._loader is not None
        if not self._parts.drawn:  # not of an epoch: validation, or the first batch alone
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                self._draw_order()
        self._parts.drawn = False
        sizes = [len(batch) for batch in self._parts.order]
        for raw, total in zip(self._loader, sizes, strict=True):
            first, end = bounds(total, self.rank, self.ranks)
            yield Part(raw, end - first, total)

    def _of_batches(self) -> Iterator[Part]:
        with _stream(self):
            batches = iter(self.data)
        while True:
            with _stream(self):
                try:
                    raw = next(batches)
                except StopIteration:
                    return
            yield part_of(raw, self.rank, self.ranks, self.example_inputs)


class _stream:
    """Random numbers of reading, apart from those of the network, for as long as it is open."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def __enter__(self) -> None:
        if self.shared._reading is not None:
            self.others = torch.get_rng_state()
            torch.set_rng_state(self.shared._reading)

    def __exit__(self, *_: object) -> None:
        if self.shared._reading is not None:
            self.shared._reading = torch.get_rng_state()
            torch.set_rng_state(self.others)


class _Indices(torch.utils.data.Dataset[Any]):
    """A dataset whose samples are their own indices."""

    def __getitem__(self, index: Any) -> Any:
        return index


class _Parts:
    """A batch sampler: this process's part of the batches of an order; where it has none, the first sample stands in."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.order: list[list[Any]] = []
        self.drawn = False

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Sequence[Any]]:
        for batch in self.order:
            first, end = bounds(len(batch), self.rank, self.ranks)
            yield batch[first:end] or batch[:1]


def _loader(data: Any, parts: _Parts, generator: torch.Generator) -> DataLoader[Any] | None:
    """The same loader for a part of each batch; None where batches cannot be divided before they are read."""
    if type(data) is not DataLoader or data.batch_sampler is None or isinstance(data.dataset, torch.utils.data.IterableDataset):
        return None
    return DataLoader(
        data.dataset,
        batch_sampler=parts,  # type: ignore[arg-type]
        num_workers=data.num_workers,
        collate_fn=data.collate_fn,
        pin_memory=data.pin_memory,
        timeout=data.timeout,
        worker_init_fn=data.worker_init_fn,
        multiprocessing_context=data.multiprocessing_context,
        generator=generator,
        prefetch_factor=data.prefetch_factor,
        persistent_workers=data.persistent_workers,
    )
