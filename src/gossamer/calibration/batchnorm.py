"""Batch-norm statistics measured again, after compression has shifted what flows through the network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.sources.batches import split


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any], example_inputs: Any) -> int:
    """Replace running means and variances by those of ``batches``, in place; everything else stays in eval mode.

    Each batch counts equally (cumulative average). Statistics of a layer are measured with every layer before it already using its batch's own
    statistics, as in training.

    Args:
        model: the network; only running statistics change, and modes are restored.
        batches: as `gossamer.sources.batches.split` takes them.
        example_inputs: tells inputs from targets.

    Returns:
        Number of batch-norm layers that were re-estimated.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.running_mean is not None]
    if not layers:
        return 0
    modes = {m: m.training for m in model.modules()}
    momenta = [m.momentum for m in layers]
    model.eval()
    seen = 0
    try:
        for m in layers:
            m.reset_running_stats()
            m.momentum = None
            m.train()
        with torch.no_grad():
            for raw in batches:
                batch = split(raw, example_inputs)
                model(*batch.args, **batch.kwargs)
                seen += 1
    finally:
        for m, momentum in zip(layers, momenta, strict=True):
            m.momentum = momentum
        for module, training in modes.items():
            module.training = training
    return len(layers) if seen else 0
