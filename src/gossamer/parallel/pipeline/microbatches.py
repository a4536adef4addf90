"""Batches as whole micro-batches; what cannot be divided is refused before anything waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from gossamer.errors import UsageError
from gossamer.parallel.options import Parallel
from gossamer.result import ExampleInputs
from gossamer.sources.batches import Batch
from gossamer.training.feeding import samples_of, take_apart


def choose_size(batch_size: int, ranks: int, parallel: Parallel) -> int:
    """Samples of a micro-batch.

    Examples:
        >>> choose_size(32, 2, Parallel(data=2, pipeline=2)), choose_size(6, 1, Parallel(pipeline=2, microbatches=3))
        (4, 2)

    Args:
        batch_size: samples of a whole batch.
        ranks: pipelines that share it.
        parallel: says how many micro-batches; where it does not, up to two for each stage.

    Raises:
        UsageError: the batch is not so many whole micro-batches.
    """
    wanted = parallel.microbatches
    if wanted is not None:
        if batch_size % (wanted * ranks):
            each = f" in each of {ranks} pipelines" if ranks > 1 else ""
            raise UsageError(
                f"a batch of {batch_size} samples is not {wanted} equal micro-batches{each}: use a batch size that {wanted * ranks} divides"
            )
        return batch_size // (wanted * ranks)
    if batch_size % ranks:
        raise UsageError(f"a batch of {batch_size} samples is not divided equally among {ranks} pipelines: use another batch size")
    own = batch_size // ranks
    return own // max(m for m in range(1, 2 * parallel.pipeline + 1) if own % m == 0)


def check_batches(data: Any, whole: int, example_inputs: ExampleInputs) -> None:
    """UsageError where a batch is known not to be whole micro-batches.

    Args:
        data: a DataLoader or a list; of other data batches are checked as they come.
        whole: what their samples must be a multiple of.
        example_inputs: of `gossamer.fit`.
    """
    for number, n in enumerate(_sizes(data, example_inputs)):
        if n % whole:
            raise UsageError(f"batch {number + 1} of an epoch: {uneven(n, whole)}")


def uneven(n: int, whole: int) -> str:
    """What is wrong with a batch of ``n`` samples, and what to do."""
    return (
        f"{n} samples are not whole micro-batches of {whole} together: leave the rest out (drop_last=True), or choose microbatches and a batch "
        "size that divide the data"
    )


def pieces(batch: Batch, size: int) -> list[Batch]:
    """A batch as micro-batches: what has a row for each sample is cut, all else is in each.

    Examples:
        >>> import torch
        >>> [b.args[0].tolist() for b in pieces(Batch((torch.arange(4),), {}, torch.arange(4)), 2)]
        [[0, 1], [2, 3]]
    """
    n = samples_of(batch)

    def cut(first: int) -> Any:
        def one(leaf: Any) -> Any:
            return leaf[first : first + size] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == n else leaf

        return one

    return [Batch(*pytree.tree_map(cut(first), tuple(batch))) for first in range(0, n, size)]


def _sizes(data: Any, example_inputs: ExampleInputs) -> Iterator[int]:
    if type(data) is DataLoader and isinstance(data.batch_size, int) and hasattr(data.sampler, "__len__"):
        count: int = len(data.sampler)  # type: ignore[arg-type]
        whole, rest = divmod(count, data.batch_size)
        if whole:
            yield data.batch_size
        if rest and not data.drop_last:
            yield rest
    elif isinstance(data, list | tuple):
        for raw in data:
            yield samples_of(take_apart(raw, example_inputs))
