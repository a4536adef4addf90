"""What a state dict takes: raw, coded, and the entropy below which no coding of the same symbols gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gossamer.coding.coder import code, patterns


@dataclass(frozen=True)
class Storage:
    """What weights take on disk.

    Attributes:
        dense_bytes: all tensors as they are.
        coded_bytes: what `encode` makes of them, its index included.
        entropy_bytes: order-0 entropy of what is coded: for each tensor the positions of its non-zero entries and their symbols (codes of a
            codebook, or bytes at each place of a value), plus codebooks as they are. Repeated patterns can take less.
        zeros: zero entries of weights; weights are integer or floating tensors of two dimensions and more.
        numel: entries of weights.
    """

    dense_bytes: int
    coded_bytes: int
    entropy_bytes: int
    zeros: int
    numel: int

    @property
    def sparsity(self) -> float:
        """Share of the weights' entries that are zero, 0 to 1."""
        return self.zeros / self.numel if self.numel else 0.0

    def __str__(self) -> str:
        return (
            f"{_size(self.coded_bytes)} of {_size(self.dense_bytes)}, entropy bound {_size(self.entropy_bytes)}; {self.sparsity:.1%} zeros"
        )


def storage(state: Mapping[str, Tensor]) -> Storage:
    """Measure what a state dict takes, raw and coded, beside its entropy bound; it is really coded for that.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> weight = torch.randint(0, 4, (512, 512), generator=generator) * (torch.rand(512, 512, generator=generator) < 0.1)
        >>> print(storage({"weight": weight.float()}))
        16.9 kB of 1.05 MB, entropy bound 16.5 kB; 92.5% zeros

    Args:
        state: name -> tensor, as `encode` takes it.

    Returns:
        Bytes and counts; printing it gives one line.

    Raises:
        WeightsError: an entry cannot be coded.
    """
    coded = code(state)
    weights = [t for t in state.values() if t.dim() > 1 and t.dtype != torch.bool]
    numel = sum(t.numel() for t in weights)
    return Storage(
        dense_bytes=sum(t.numel() * t.element_size() for t in state.values()),
        coded_bytes=sum(t.numel() for t in coded.tensors.values()),
        entropy_bytes=round(coded.bound),
        zeros=sum(map(_zeros, weights)),
        numel=numel,
    )


def _zeros(tensor: Tensor) -> int:
    array = patterns(tensor)
    if tensor.is_floating_point():
        array = array << array.dtype.type(1)  # the sign of a zero does not matter
    return tensor.numel() - int(np.count_nonzero(array.reshape(tensor.numel(), -1).any(1)))


def _size(n: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n} B"
