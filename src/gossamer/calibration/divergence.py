"""How far a changed network's outputs are from the original's, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.errors import UsageError
from gossamer.profiling.runtime import evaluating
from gossamer.sources.batches import Batch, outputs

HELD_BYTES = 2**28
"""Of the original's outputs: dense ones are large, and a few samples of them say enough."""


class Divergence:
    """The original's outputs on some batches, and the distance of another network's from them.

    Logits, outputs of two dimensions and more than one column, are compared by the Kullback-Leibler divergence of their softmax, in nats a
    sample; all else by squared error, relative to the variance. Several outputs add up.

    Examples:
        >>> import torch
        >>> net = nn.Linear(4, 3)
        >>> far = Divergence(net, [Batch((torch.randn(8, 4),), {}, None)])
        >>> far(net), far(nn.Linear(4, 3)) > 0
        (0.0, True)

    Args:
        model: the original.
        batches: taken apart.
        samples: batches are taken until there are this many, or their outputs fill `HELD_BYTES`.

    Attributes:
        count: samples taken.

    Raises:
        UsageError: there is no batch, or no output is a floating-point tensor.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch], *, samples: int = 64) -> None:
        self._batches: list[Batch] = []
        self._wanted: list[list[Tensor]] = []
        seen = size = 0
        with evaluating(model):
            for batch in batches:
                self._batches.append(batch)
                self._wanted.append(numbers(model(*batch.args, **batch.kwargs)))
                seen += len(next((t for t in (*batch.args, *batch.kwargs.values()) if isinstance(t, Tensor) and t.dim()), [0]))
                size += sum(t.numel() * t.element_size() for t in self._wanted[-1])
                if seen >= samples or size >= HELD_BYTES:
                    break
        if not self._batches:
            raise UsageError("no calibration batch: the data is empty")
        self.count = sum(len(w[0]) if w and w[0].dim() else 1 for w in self._wanted)
        if not any(self._wanted):
            raise UsageError("the network gives no floating-point output to compare")

    def __call__(self, model: nn.Module) -> float:
        """The distance, 0 or more; infinite where outputs are not finite."""
        return self.mean([self.total(model)])

    def total(self, model: nn.Module, first: int = 0, step: int = 1) -> float:
        """The sum of the samples' distances, over every ``step``-th batch from the ``first`` on."""
        total = 0.0
        with evaluating(model):
            for batch, wanted in zip(self._batches[first::step], self._wanted[first::step], strict=True):
                for a, b in zip(wanted, numbers(model(*batch.args, **batch.kwargs)), strict=True):
                    total += _distance(a, b) * len(a) if a.dim() else _distance(a, b)
        return total

    def mean(self, totals: Iterable[float]) -> float:
        """The distance of a network whose `total`, of batches that together are all, are these."""
        value = sum(totals) / self.count
        return max(value, 0.0) if value == value else float("inf")

    def pulls(self, draws: int, generator: torch.Generator) -> Iterator[tuple[Batch, list[list[Tensor]]]]:
        """Each batch with random vectors v of its outputs, for each draw: E[v v^T] is the second derivative of the distance, times `count`."""
        for batch, wanted in zip(self._batches, self._wanted, strict=True):
            yield batch, [[_pull(a, generator) for a in wanted] for _ in range(draws)]


def _distance(a: Tensor, b: Tensor) -> float:
    if a.dim() == 2 and a.shape[1] > 1:
        logs = [F.log_softmax(t.double(), 1) for t in (b, a)]
        return float(F.kl_div(logs[0], logs[1], log_target=True, reduction="batchmean"))
    spread = float((a.double() - a.double().mean()).square().mean())
    return float((a.double() - b.double()).square().mean()) / max(spread, 1e-12)


def _pull(a: Tensor, generator: torch.Generator) -> Tensor:
    """A random vector v of E[v v^T] = d2/db2 `_distance(a, b)` at b = a, times the samples."""
    signs = (2 * torch.randint(2, a.shape, generator=generator) - 1).to(a.device)
    if a.dim() == 2 and a.shape[1] > 1:  # diag(p) - p p^T for each sample
        p = a.double().softmax(1)
        root = p.sqrt() * signs
        return root - p * root.sum(1, keepdim=True)
    spread = float((a.double() - a.double().mean()).square().mean())
    samples = len(a) if a.dim() else 1
    return signs * (2 * samples / (a.numel() * max(spread, 1e-12))) ** 0.5


def numbers(out: object) -> list[Tensor]:
    """The outputs that are compared: floating-point tensors."""
    return [t for t in outputs(out) if t.is_floating_point()]
