"""What a training step would take, without training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.result import ExampleInputs
from gossamer.training.feeding import count_batches, own_randomness
from gossamer.training.objectives import as_objective
from gossamer.training.optimizers import make_optimizer
from gossamer.training.precision import make_scaler
from gossamer.training.rematerialization.planning import plan_memory
from gossamer.training.rematerialization.report import MemoryReport
from gossamer.training.stepping import Stepper


def explain_memory(
    model: nn.Module,
    data: Iterable[Any],
    *,
    objective: str | Callable[..., Tensor] | None = None,
    optimizer: str = "adamw",
    memory_budget: str | int | None = None,
    precision: str = "fp32",
    optimizer_in_backward: bool = False,
    example_inputs: ExampleInputs = None,
    channels_last: bool | Literal["auto"] = "auto",
) -> MemoryReport:
    """Measure what a training step takes on the first batch: weights, gradients, optimiser state, and activations block by block.

    Examples:
        >>> net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
        >>> report = explain_memory(net, [(torch.zeros(64, 256), torch.zeros(64, dtype=torch.long))])
        >>> report.weight_bytes == report.gradient_bytes, report.peak_bytes > 4 * report.weight_bytes
        (True, True)

    Args:
        model: stays as it is.
        data: batches as `gossamer.fit` takes them.
        objective, optimizer, memory_budget, precision, optimizer_in_backward, example_inputs, channels_last: of `gossamer.fit`.

    Returns:
        A `MemoryReport`; it prints as a table and a picture.

    Raises:
        BudgetError: the budget cannot be met; the smallest reachable peak is named.
        UsageError, SourceError: as `gossamer.fit`.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with own_randomness(data, device):
        count_batches(data)
        copied = copy.deepcopy(model)
        run = Stepper(
            model=copied,
            optimizer=make_optimizer(copied, name=optimizer),
            objective=as_objective(objective),
            example_inputs=example_inputs,
            device=device,
            lr=1e-3,
            warmup=0.0,
            clip=None,
            penalty=None,
            total=1,
            channels_last=None if channels_last == "auto" else channels_last,
            precision=precision,
            scaler=make_scaler(device, precision),
        )
        with plan_memory(run, data, memory_budget, optimizer_in_backward=optimizer_in_backward) as report:
            return report
