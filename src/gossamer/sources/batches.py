"""What a batch is: a tensor, a dict of keyword inputs, or a tuple of inputs followed by the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.errors import SourceError


class Batch(NamedTuple):
    """One batch taken apart: positional inputs, keyword inputs, and the target where there is one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any


def split(batch: Any, example_inputs: Any) -> Batch:
    """Take a batch apart.

    Examples:
        >>> split((torch.zeros(2, 3), torch.tensor([0, 1])), (torch.zeros(1, 3),)).target
        tensor([0, 1])

    Args:
        batch: a tensor, a dict of keyword inputs, or a tuple/list whose leading ``len(example_inputs)`` items are inputs (or
            whose first item is a dict of keyword inputs) and whose next item is the target.
        example_inputs: a tuple of positional inputs, or a dict of keyword inputs.

    Returns:
        A `Batch`; ``target`` is None where the batch holds none.

    Raises:
        SourceError: the batch holds fewer inputs than the network takes.
    """
    if isinstance(batch, Tensor):
        return Batch((batch,), {}, None)
    if isinstance(batch, dict):
        return Batch((), batch, None)
    if not isinstance(batch, tuple | list):
        raise SourceError(f"a batch must be a tensor, a dict or a tuple, not {type(batch).__name__}")
    if batch and isinstance(batch[0], dict):
        return Batch((), batch[0], batch[1] if len(batch) > 1 else None)
    n = len(example_inputs)
    if len(batch) < n:
        raise SourceError(f"a batch has {len(batch)} items, but the network takes {n} inputs")
    return Batch(tuple(batch[:n]), {}, batch[n] if len(batch) > n else None)


def call(model: nn.Module | Callable[..., Any], example_inputs: Any) -> Any:
    """Run ``model`` on example inputs (a tuple, or a dict of keyword inputs)."""
    return model(**example_inputs) if isinstance(example_inputs, dict) else model(*example_inputs)


def check_inputs(example_inputs: Any) -> Any:
    """Example inputs as a tuple or a dict; a lone tensor becomes a tuple of one."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, list):
        return tuple(example_inputs)
    if not isinstance(example_inputs, tuple | dict) or not example_inputs:
        raise SourceError(f"example_inputs must be a tuple of tensors or a dict, not {type(example_inputs).__name__}")
    return example_inputs


def outputs(out: Any) -> list[Tensor]:
    """The tensors of a network's output, in order: a tensor, or tuples, lists, dicts and dataclass-like mappings of them."""
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]


def count(batches: Iterable[Any]) -> int | None:
    """Number of batches where it is known without reading them."""
    return len(batches) if isinstance(batches, Sized) else None
