"""From how many zeros on a sparse kernel is faster than a dense one, on this machine, for the linear layers of a network."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.errors import UsageError
from gossamer.profiling.latency import time_interleaved

SPARSITIES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
"""Fractions of zeros that are measured."""
MOST = 4
"""Shapes of a network that are measured, those with the most weights first."""


@dataclass(frozen=True)
class SparseTiming:
    """A linear layer in compressed sparse rows (CSR) against the dense one.

    Attributes:
        outputs, inputs: of the layer.
        batch: rows of its input.
        sparsity: fraction of zeros, at random.
        ratio, ratio_p10, ratio_p90: time of the sparse kernel to the dense one's of the same round; below 1 is faster.
    """

    outputs: int
    inputs: int
    batch: int
    sparsity: float
    ratio: float
    ratio_p10: float
    ratio_p90: float


@dataclass(frozen=True)
class SparseKernels:
    """Timings of sparse linear layers; prints as a table.

    Attributes:
        rows: one for each shape, batch and sparsity.
        threads: of torch.
    """

    rows: tuple[SparseTiming, ...]
    threads: int

    def break_even(self, outputs: int, inputs: int, batch: int) -> float | None:
        """The smallest measured sparsity from which on the sparse kernel is faster, at all higher ones too; None where it never is."""
        found = None
        for row in sorted((r for r in self.rows if (r.outputs, r.inputs, r.batch) == (outputs, inputs, batch)), key=lambda r: -r.sparsity):
            if row.ratio >= 1:
                break
            found = row.sparsity
        return found

    def __str__(self) -> str:
        from gossamer.report.text import sparse_kernels_table

        return sparse_kernels_table(self)


def sparse_kernels(
    layers: nn.Module | Sequence[tuple[int, int]],
    *,
    batches: Sequence[int] = (1, 32),
    sparsities: Sequence[float] = SPARSITIES,
    threads: int = 1,
    seconds: float = 0.2,
) -> SparseKernels:
    """Time linear layers with random zeros in torch's CSR kernel against the dense one, interleaved.

    ONNX Runtime has no kernel that skips zeros, and convolutions have none in torch either.

    Examples:
        >>> timed = sparse_kernels([(64, 64)], batches=[1], sparsities=[0.5, 0.99], seconds=0.01)
        >>> [(row.sparsity, row.ratio > 0) for row in timed.rows]
        [(0.5, True), (0.99, True)]

    Args:
        layers: a network, of whose linear layers the largest shapes are taken, or pairs of outputs and inputs.
        batches: rows of the input.
        sparsities: fractions of zeros, in [0, 1).
        threads: of torch.
        seconds: for each timing.

    Raises:
        UsageError: the network has no linear layer, or a sparsity lies outside its range.
    """
    if isinstance(layers, nn.Module):
        shapes = sorted({(m.out_features, m.in_features) for m in layers.modules() if isinstance(m, nn.Linear)}, key=lambda s: -s[0] * s[1])
        if not shapes:
            raise UsageError("the network has no linear layer: torch's sparse kernels know no others")
    else:
        shapes = list(layers)
    if not all(0 <= s < 1 for s in sparsities):
        raise UsageError(f"sparsities={list(sparsities)}: fractions of zeros lie in [0, 1)")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = tuple(row for shape in shapes[:MOST] for batch in batches for row in _timed(*shape, batch, sparsities, seconds))
    finally:
        torch.set_num_threads(before)
    return SparseKernels(rows, threads)


def _timed(outputs: int, inputs: int, batch: int, sparsities: Sequence[float], seconds: float) -> list[SparseTiming]:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(outputs, inputs, generator=generator), torch.randn(batch, inputs, generator=generator)
    chance = torch.rand(outputs, inputs, generator=generator)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta
        sparse = [torch.where(chance < s, 0.0, w).to_sparse_csr() for s in sparsities]

        def dense() -> Tensor:
            return F.linear(x, w)

        times = time_interleaved([dense, *((lambda m=m: (m @ x.T).T) for m in sparse)], seconds=seconds)
    ratios = times[:, 1:] / times[:, :1]
    low, middle, high = np.percentile(ratios, [10, 50, 90], axis=0)
    return [SparseTiming(outputs, inputs, batch, s, float(middle[i]), float(low[i]), float(high[i])) for i, s in enumerate(sparsities)]
