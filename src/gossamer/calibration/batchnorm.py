"""Batch-norm statistics measured again, after compression has shifted what flows through the network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.sources.batches import Batch, split


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
    seen = 0
    with measuring_batch_norms(model) as layers, torch.no_grad():
        if layers:
            for raw in batches:
                batch = raw if isinstance(raw, Batch) else split(raw, example_inputs)
                model(*batch.args, **batch.kwargs)
                seen += 1
    return layers if seen else 0


@contextmanager
def measuring_batch_norms(model: nn.Module) -> Iterator[int]:
    """Within it, batch norms use the statistics of each batch and average them from scratch; everything else is in eval mode.

    Args:
        model: modes are restored at the end, and statistics too where no batch came.

    Yields:
        Number of batch-norm layers whose statistics are measured.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.running_mean is not None]
    modes = {m: m.training for m in model.modules()}
    momenta = [m.momentum for m in layers]
    kept = [{n: b.clone() for n, b in m.named_buffers()} for m in layers]
    model.eval()
    try:
        for m in layers:
            m.reset_running_stats()
            m.momentum = None
            m.train()
        yield len(layers)
    finally:
        for m, momentum, before in zip(layers, momenta, kept, strict=True):
            m.momentum = momentum
            if m.num_batches_tracked is not None and not int(m.num_batches_tracked):  # it was never reached
                for name, buffer in before.items():
                    m.get_buffer(name).copy_(buffer)
        for module, training in modes.items():
            module.training = training
