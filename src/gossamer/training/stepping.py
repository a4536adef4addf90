"""One optimiser step: forward and backward passes of one or several batches, scaling, clipping, the update, and what follows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from gossamer.errors import UsageError
from gossamer.result import ExampleInputs
from gossamer.sources.batches import Batch
from gossamer.training.feeding import take_apart
from gossamer.training.layout import lay_out, set_layout, takes_channels_last
from gossamer.training.objectives import Objective
from gossamer.training.optimizers import lr_factor, step_in_backward
from gossamer.training.placement import Placement
from gossamer.training.precision import autocast


@dataclass
class Stepper:
    """What stays the same over all steps, and how one is made.

    Attributes:
        model: in training.
        optimizer: over its parameters, and over those of ``extra``.
        objective: what is minimised.
        total: optimiser steps of the whole training.
        lr, warmup, clip, penalty, precision, accumulate: of `fit`.
        average: follows the weights, or None.
        scaler: of fp16, or None.
        after_step: called with the network after each update, before the average follows.
        channels_last: None until the first batch decides.
        placement: where the passes are made.
    """

    model: nn.Module
    optimizer: Optimizer
    objective: Objective
    example_inputs: ExampleInputs
    device: torch.device
    lr: float
    warmup: float
    clip: float | None
    penalty: Callable[[nn.Module], Tensor] | None
    total: int
    channels_last: bool | None
    placement: Placement = field(default_factory=Placement)
    precision: str = "fp32"
    average: AveragedModel | None = None
    scaler: torch.amp.GradScaler | None = None
    after_step: Callable[[nn.Module], None] | None = None
    _in_backward: list[Any] | None = field(default=None, repr=False)
    _rate: float = 1.0

    def prepare(self, raw: Any) -> Batch:
        """A raw batch taken apart, on the device and in the layout of the network; decides the layout at the first one."""
        batch = take_apart(raw, self.example_inputs)
        if self.device.type != "cpu":
            batch = Batch(*pytree.tree_map(lambda t: t.to(self.device) if isinstance(t, Tensor) else t, tuple(batch)))
        if self.channels_last is None:
            self.channels_last = takes_channels_last(self.model, self.objective, batch)
            set_layout(self.model, self.channels_last, optimizer=self.optimizer)
        if not self.channels_last:
            return batch
        return Batch(lay_out(batch.args, True), lay_out(batch.kwargs, True), batch.target)

    def loss_of(self, batch: Batch, where: str) -> Tensor:
        """The objective on a batch; UsageError where it is not one finite number."""
        with autocast(self.device, self.precision):
            loss = self.objective(self.model, batch)
        self.check_finite(check_one(loss).item(), where)
        return loss

    def check_finite(self, loss: float, where: str) -> None:
        """UsageError where a loss is NaN or infinite."""
        if not math.isfinite(loss):
            raise UsageError(f"the loss is {loss} at {where}: lower the learning rate (lr={self.lr:g}), clip gradients, or check the data")

    def backward(self, loss: Tensor, weight: float = 1.0) -> None:
        """Gradients of ``weight`` times the loss and the penalty, added to those that are there."""
        if self.penalty is not None:
            loss = loss + self.penalty(self.model)
        if weight != 1:
            loss = loss * weight
        self.scaled(loss).backward()

    def scaled(self, loss: Tensor) -> Tensor:
        """A loss as the scaler of fp16 wants it."""
        scaled: Tensor = loss if self.scaler is None else self.scaler.scale(loss)
        return scaled

    def step(self, raws: Sequence[Any], done: int, where: Callable[[int], str]) -> list[tuple[float, int]]:
        """One optimiser step on one or several batches, as if they were one.

        Args:
            raws: batches; each sample counts the same, whatever the size of its batch.
            done: optimiser steps that were made before.
            where: names a batch by its position in ``raws``, for messages.

        Returns:
            For each batch its loss before the step, and its samples.
        """
        self._begin(done)
        found: list[tuple[float, int]] = []
        for position, raw in enumerate(raws):
            reference = found[0][1] if found else None
            found.append(self.placement.learn(self, raw, reference, where(position), last=position == len(raws) - 1))
        if len(found) > 1:
            scale = found[0][1] / sum(n for _, n in found)
            torch._foreach_mul_([p.grad for p in self._parameters() if p.grad is not None], scale)
        self._update()
        return found

    def use_backward_hooks(self) -> None:
        """From now on step each parameter in the backward pass; after a restored state, not before."""
        self._in_backward = step_in_backward(self.optimizer, self._set_rates)

    def close(self) -> None:
        """Take hooks off the parameters."""
        for handle in self._in_backward or ():
            handle.remove()
        self._in_backward = None

    def _begin(self, done: int) -> None:
        if hasattr(self.objective, "progress"):
            self.objective.progress(done / self.total)
        self._rate = self.lr * lr_factor(done, self.total, warmup=self.warmup)
        self._set_rates(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)

    def _set_rates(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self._rate * group.get("scale", 1.0)

    def _update(self) -> None:
        if self._in_backward is None:
            if self.clip is not None:
                if self.scaler is not None:
                    self.scaler.unscale_(self.optimizer)
                self.placement.clip(self._parameters(), self.clip)
            if self.scaler is not None:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.optimizer.step()
        if self.after_step is not None:
            with torch.no_grad():
                self.after_step(self.model)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def check_one(loss: Any) -> Tensor:
    """A loss; UsageError where it is not one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UsageError(f"the objective must return one number, not {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss)}")
    return loss
