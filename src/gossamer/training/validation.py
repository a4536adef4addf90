"""How the network does on validation data after an epoch: loss, accuracy, metrics; in eval mode, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.errors import SourceError
from gossamer.sources.batches import Batch
from gossamer.training.metrics import accuracy
from gossamer.training.objectives import logits_of
from gossamer.training.precision import autocast

if TYPE_CHECKING:
    from gossamer.training.stepping import Stepper


def validate(run: Stepper, model: nn.Module, val: Iterable[Any], metrics: Mapping[str, Callable[[Any, Any], Any]]) -> dict[str, float]:
    """Means over the samples of ``val``: ``val_loss``, ``val_accuracy`` where targets are class indices, and ``val_NAME`` of each metric.

    Raises:
        SourceError: there is not one batch.
    """
    model.eval()
    sums: dict[str, float] = {}
    with torch.no_grad(), autocast(run.device, run.precision):
        for raw in val:
            figures, n = run.placement.judge(run, model, raw, metrics)
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + n * value
                sums[f"n {name}"] = sums.get(f"n {name}", 0) + n
    if not sums:
        raise SourceError("the validation data is empty: not one batch came out of it")
    sums = run.placement.total(sums)
    return {f"val_{name}": sums[name] / sums[f"n {name}"] for name in sums if f"n {name}" in sums}


def figures_of(run: Stepper, model: nn.Module, batch: Batch, metrics: Mapping[str, Callable[[Any, Any], Any]]) -> dict[str, float]:
    """The loss of a batch, its accuracy where targets are class indices, and each metric."""
    out = model(*batch.args, **batch.kwargs)
    figures = {"loss": run.objective(model, batch).item()}
    target = batch.target
    if isinstance(target, Tensor) and not target.is_floating_point() and "accuracy" not in metrics:
        z_NC = logits_of(out)
        if z_NC.dim() > 1 and z_NC.argmax(1).shape == target.shape:
            figures["accuracy"] = float(accuracy(z_NC, target))
    return figures | {name: float(metric(out, target)) for name, metric in metrics.items()}
