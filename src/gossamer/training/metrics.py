"""What is measured on validation data, by name or as callables ``(outputs, target) -> number``; a mean over the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gossamer.errors import UsageError, near
from gossamer.training.objectives import logits_of
from gossamer.training.options import Metrics


def accuracy(out: Any, target: Tensor) -> Tensor:
    """Fraction of samples, or positions, whose largest logit is the target's.

    Examples:
        >>> import torch
        >>> accuracy(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1])).item()
        0.5
    """
    return (logits_of(out).argmax(1) == target).float().mean()


def top5(out: Any, target: Tensor) -> Tensor:
    """Fraction of samples, or positions, whose target is among the five largest logits.

    Examples:
        >>> import torch
        >>> top5(torch.arange(8.0).repeat(2, 1), torch.tensor([3, 0])).item()
        0.5
    """
    z_NC = logits_of(out)
    best = z_NC.topk(min(5, z_NC.shape[1]), dim=1).indices
    return (best == target.unsqueeze(1)).any(1).float().mean()


def mse(out: Any, target: Tensor) -> Tensor:
    """Mean squared error."""
    return (logits_of(out) - target).square().mean()


def mae(out: Any, target: Tensor) -> Tensor:
    """Mean absolute error."""
    return (logits_of(out) - target).abs().mean()


METRICS: Mapping[str, Callable[[Any, Any], Any]] = {"accuracy": accuracy, "top5": top5, "mse": mse, "mae": mae}
"""Metrics by name."""


def as_metrics(given: Metrics) -> dict[str, Callable[[Any, Any], Any]]:
    """Metrics by name from names or a mapping; UsageError for an unknown name (near names are listed)."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping):
        wrong = [k for k, v in given.items() if not callable(v)]
        if wrong:
            raise UsageError(f"metric {wrong[0]!r} is not callable: give (outputs, target) -> number")
        return dict(given)
    for name in given:
        if name not in METRICS:
            raise UsageError(
                f"unknown metric {name!r}, known are {', '.join(METRICS)}, or a mapping of callables{near(str(name), METRICS)}"
            )
    return {name: METRICS[name] for name in given}
