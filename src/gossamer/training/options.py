"""What `fit` takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from gossamer.errors import UsageError
from gossamer.result import ExampleInputs

if TYPE_CHECKING:
    from gossamer.parallel import Parallel
    from gossamer.training.rematerialization import MemoryReport

ProgressHook = Callable[[int, int], None]
"""Called with steps done and steps in total."""
Precision = Literal["fp32", "bf16", "fp16"]
Metrics = Sequence[str] | Mapping[str, Callable[[Any, Any], Any]]


@dataclass(frozen=True)
class FitResult:
    """A trained network.

    Attributes:
        model: the trained copy, in the mode and on the device of the network that was given.
        history: for each epoch ``epoch``, ``objective``, ``loss`` (mean over the samples), ``lr`` (of its last step), ``seconds`` since
            the start, and ``val_loss``, ``val_accuracy``, ``val_NAME`` of each metric where there is validation data.
        seconds: spent in all sittings.
        steps: optimiser steps that were made.
        optimizer_state_bytes: of the optimiser's state at the end, in this process.
        best_epoch: the epoch whose weights came back, where ``patience`` chose it; None: the last.
        memory: measured peak, and where checkpoints were placed, with ``memory_budget`` or ``measure_memory``.
    """

    model: nn.Module
    history: tuple[dict[str, Any], ...]
    seconds: float
    steps: int
    optimizer_state_bytes: int = 0
    best_epoch: int | None = None
    memory: MemoryReport | None = None

    def __str__(self) -> str:
        last = self.history[(self.best_epoch or 0) - 1] if self.history else {}
        figures = "".join(f", {k} {last[k]:.4g}" for k in ("loss", "val_loss", "val_accuracy") if last.get(k) is not None)
        best = f", the weights of epoch {self.best_epoch}" if self.best_epoch is not None else ""
        state = f", optimiser state {self.optimizer_state_bytes / 2**20:.1f} MiB"
        peak = f", peak {self.memory.peak_bytes / 2**20:.0f} MiB" if self.memory is not None else ""
        return f"trained {len(self.history)} epochs, {self.steps} steps, {self.seconds:.1f} s{best}{figures}{state}{peak}"


class TrainingOptions(TypedDict, total=False):
    """Keyword arguments of `fit` that every kind of training takes."""

    epochs: int
    lr: float
    optimizer: str
    weight_decay: float
    momentum: float
    warmup: float
    layer_decay: float
    clip: float | None
    accumulate: int
    ema: float | None
    precision: Precision
    seed: int
    val: Iterable[Any] | None
    metrics: Metrics
    patience: int | None
    monitor: str
    example_inputs: ExampleInputs
    checkpoint: str | Path | None
    checkpoint_every: int | None
    resume: bool
    log: str | Path | None
    tensorboard: str | Path | None
    mlflow: str | None
    progress: ProgressHook | None
    device: str | torch.device | None
    channels_last: bool | Literal["auto"]
    penalty: str | Callable[[nn.Module], Tensor] | None
    penalty_weight: float
    memory_budget: str | int | None
    measure_memory: bool
    optimizer_in_backward: bool
    after_step: Callable[[nn.Module], None] | None
    parallel: Parallel | None


class FitOptions(TrainingOptions, total=False):
    """All keyword arguments of `fit`."""

    objective: str | Callable[..., Tensor] | None


def check_options(
    *,
    epochs: int,
    warmup: float,
    clip: float | None,
    checkpoint_every: int | None,
    accumulate: int,
    ema: float | None,
    precision: str,
    patience: int | None,
    val: Any,
    optimizer_in_backward: bool,
) -> None:
    """UsageError that names the first option outside its range, or two that exclude one another."""
    if epochs < 1 or not 0 <= warmup < 1 or (clip is not None and not clip > 0) or (checkpoint_every is not None and checkpoint_every < 1):
        raise UsageError("training needs epochs >= 1, warmup in [0, 1), clip > 0 and checkpoint_every >= 1")
    if accumulate < 1 or (ema is not None and not 0 < ema < 1) or (patience is not None and patience < 1):
        raise UsageError("training needs accumulate >= 1, ema in (0, 1) and patience >= 1")
    if precision not in ("fp32", "bf16", "fp16"):
        raise UsageError(f"precision={precision!r}: known are fp32, bf16, fp16")
    if patience is not None and val is None:
        raise UsageError("patience needs validation data: give val")
    if optimizer_in_backward and (clip is not None or accumulate > 1 or precision == "fp16"):
        raise UsageError(
            "optimizer_in_backward frees each gradient as it is used: leave out clip, accumulate and fp16, which need them all"
        )
