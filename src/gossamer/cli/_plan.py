"""`gossamer train --plan`: what a training would cost on many processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gossamer.errors import UsageError

if TYPE_CHECKING:
    from gossamer.parallel.planning import Machine, ParallelPlan

_FLOPS = {"G": 1e9, "T": 1e12, "P": 1e15}


def machine_of(device_memory: str | None, bandwidth: str, flops: str) -> Machine:
    """What each process has, as the command line says."""
    from gossamer.parallel.planning import Machine

    return Machine(
        flops=_number(flops, _FLOPS, "--flops", "10T"),
        bandwidth=_bytes(bandwidth.removesuffix("/s"), "--bandwidth", "25GB/s"),
        memory_bytes=None if device_memory is None else int(_bytes(device_memory, "--device-memory", "16GB")),
    )


def planned(
    model: str, weights: Path | None, shape: str | None, *, world: int, batch_size: int, optimizer: str, machine: Machine
) -> ParallelPlan:
    """The plan of a training of the network that the command line names."""
    from gossamer.cli._models import open_model
    from gossamer.parallel.planning import plan_parallel

    network, inputs = open_model(model, weights=weights, shape=shape)
    return plan_parallel(network, _twice(inputs), world=world, batch_size=batch_size, machine=machine, optimizer=optimizer)


def _twice(inputs: Any) -> Any:
    """Two samples where there is one: batch norms in training need them."""
    return torch.utils._pytree.tree_map(lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() and len(t) == 1 else t, inputs)


def _bytes(text: str, option: str, example: str) -> float:
    from gossamer.recipe import SIZE_UNITS

    return _number(text, SIZE_UNITS, option, example)


def _number(text: str, units: Any, option: str, example: str) -> float:
    from gossamer.recipe import quantity

    try:
        found = quantity(text, units, option)
    except ValueError as e:
        raise UsageError(f"{e}, for example {example}") from None
    if not found > 0:
        raise UsageError(f"{option} {text!r} must be above 0, for example {example}")
    return found
