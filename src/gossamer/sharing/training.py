"""Trained codebooks of a `gossamer.cluster` result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from gossamer.errors import UsageError
from gossamer.plan import Share
from gossamer.result import Result
from gossamer.training import FitOptions, fit


def fine_tune(result: Result, data: Iterable[Any], **options: Unpack[FitOptions]) -> Result:
    """Train the codebooks of a `gossamer.cluster` result, and all that is not shared, on data; which entries share a value stays.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from gossamer.sharing import cluster
        >>> x, y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
        >>> result = cluster(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), bits=2)
        >>> tuned = fine_tune(result, [(x, y)], epochs=5, lr=0.01)
        >>> len(tuned.model[0].weight.unique()), bool((tuned.model[0].weight == result.model[0].weight).all())
        (4, False)

    Args:
        result: it is not changed.
        data: batches, as `gossamer.fit` takes them.
        **options: of `gossamer.fit`.

    Returns:
        The `Result` with the trained network, its plan with the trained values. Notes name what could not be trained.

    Raises:
        UsageError: the plan shares no weights; and all that `gossamer.fit` raises.

    Source: Han, Mao and Dally, "Deep Compression", ICLR 2016, arXiv:1510.00149, section 3.
    """
    if not any(isinstance(e, Share) for e in result.plan):
        raise UsageError("the plan of this result shares no weights: call gossamer.cluster first")
    return fit(result, data, **options)
