"""What training reads: batches taken apart and counted, and the random state that decides their order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gossamer.errors import SourceError
from gossamer.result import ExampleInputs
from gossamer.sources.batches import Batch, split


@dataclass(frozen=True)
class Part:
    """One process's part of a batch.

    Attributes:
        raw: a batch of its samples; where none are its own, a sample of another's that counts nothing.
        n: samples that count.
        total: samples of the whole batch.
    """

    raw: Any
    n: int
    total: int


def take_apart(raw: Any, example_inputs: ExampleInputs) -> Batch:
    """A batch taken apart; where nothing says how many items are inputs, all but the last are.

    Examples:
        >>> batch = take_apart((torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([0, 1])), None)
        >>> len(batch.args), batch.target
        (2, tensor([0, 1]))
    """
    if isinstance(raw, Part):
        raw = raw.raw
    if example_inputs is None:
        several = isinstance(raw, tuple | list) and not (raw and isinstance(raw[0], dict))
        example_inputs = (None,) * max(1, len(raw) - 1 if several else 1)
    return split(raw, example_inputs)


def count_batches(data: Iterable[Any]) -> int:
    """Number of batches of an epoch, by reading them where nothing else tells.

    Raises:
        SourceError: there are none, or the data can be read only once.
    """
    if not isinstance(data, Iterable) or isinstance(data, Tensor | dict):
        hint = ": pass data.loader('train', shuffle=True)" if hasattr(data, "loader") else ""
        raise SourceError(f"training data must be an iterable of batches, not {type(data).__name__}{hint}")
    if hasattr(data, "__next__"):
        raise SourceError("training data is an iterator, which can be read only once: pass a DataLoader or a list of batches")
    try:
        n = len(data)  # type: ignore[arg-type]
    except TypeError:
        n = sum(1 for _ in data)
    if n == 0:
        raise SourceError("training data is empty: not one batch comes out of it (is the batch size above the number of samples?)")
    return n


def seed_epoch(data: Any, seed: int, epoch: int, device: torch.device) -> None:
    """Seed torch, the data's own generators and its sampler, from ``(seed, epoch)`` alone."""
    mixed = mix(seed, epoch)
    seed_torch(mixed, device)
    for generator in generators_of(data):
        generator.manual_seed(mixed)
    sampler = getattr(data, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)  # type: ignore[union-attr]


def mix(*parts: int) -> int:
    """One seed from several numbers.

    Examples:
        >>> mix(0, 1) == mix(0, 1), mix(0, 1) == mix(1, 0)
        (True, False)
    """
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "little")


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of a device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def generators_of(data: Any) -> Iterator[torch.Generator]:
    """The generators that a DataLoader or its samplers hold, each once."""
    samplers = [getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    samplers.append(getattr(samplers[1], "sampler", None))
    seen: set[int] = set()
    for holder in (data, *samplers):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator) and id(generator) not in seen:
            seen.add(id(generator))
            yield generator


@contextmanager
def own_randomness(data: Any, device: torch.device) -> Iterator[None]:
    """Put back torch's random state and the data's generators at the end."""
    kept = [(g, g.get_state()) for g in generators_of(data)]
    devices = [device.index if device.index is not None else torch.cuda.current_device()] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for generator, before in kept:
            generator.set_state(before)


def samples_of(batch: Batch) -> int:
    """Samples in a batch: the length of its first input."""
    tensors = tensors_of(batch)
    return len(tensors[0]) if tensors and tensors[0].dim() else 1


def tensors_of(batch: Batch) -> list[Tensor]:
    """The tensors among a batch's inputs, in order."""
    return [t for t in pytree.tree_leaves((batch.args, batch.kwargs)) if isinstance(t, Tensor)]
