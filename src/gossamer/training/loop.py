"""The one training loop: seeded, resumable to the same weights, and on a copy of the network."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from gossamer.errors import RunFolderError, SourceError, UsageError
from gossamer.result import ExampleInputs, Result
from gossamer.sources.batches import Batch
from gossamer.training import checkpoint as checkpoints
from gossamer.training.checkpoint import Progress
from gossamer.training.feeding import count_batches, own_randomness, samples_of, seed_epoch, take_apart
from gossamer.training.layout import lay_out, set_layout, takes_channels_last
from gossamer.training.objectives import Objective, as_objective, logits_of, name_of
from gossamer.training.optimizers import lr_factor, make_optimizer
from gossamer.training.penalties import as_penalty
from gossamer.training.records import append_record, rewrite_records, size_of

ProgressHook = Callable[[int, int], None]
"""Called with steps done and steps in total."""


@dataclass(frozen=True)
class FitResult:
    """A trained network.

    Attributes:
        model: the trained copy, in the mode and on the device of the network that was given.
        history: for each epoch ``epoch``, ``objective``, ``loss`` (mean over the samples), ``lr`` (of its last step), ``seconds`` since
            the start, and ``val_loss``, ``val_accuracy`` where there is validation data.
        seconds: spent in all sittings.
        steps: optimiser steps in total.
    """

    model: nn.Module
    history: tuple[dict[str, Any], ...]
    seconds: float
    steps: int

    def __str__(self) -> str:
        last = self.history[-1] if self.history else {}
        figures = "".join(f", {k} {last[k]:.4g}" for k in ("loss", "val_loss", "val_accuracy") if last.get(k) is not None)
        return f"trained {len(self.history)} epochs, {self.steps} steps, {self.seconds:.1f} s{figures}"


@dataclass
class _Run:
    """What stays the same over all steps."""

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

    def step(self, batch: Batch, done: int, where: str) -> float:
        """One optimiser step; returns the loss before it."""
        if hasattr(self.objective, "progress"):
            self.objective.progress(done / self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor(done, self.total, warmup=self.warmup)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.objective(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise UsageError(f"the objective must return one number, not {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss)}")
        value = loss.item()
        if not math.isfinite(value):
            raise UsageError(f"the loss is {value} at {where}: lower the learning rate (lr={self.lr:g}), clip gradients, or check the data")
        if self.penalty is not None:
            loss = loss + self.penalty(self.model)
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return value


class TrainingOptions(TypedDict, total=False):
    """Keyword arguments of `fit` that every kind of training takes."""

    epochs: int
    lr: float
    optimizer: str
    weight_decay: float
    momentum: float
    warmup: float
    clip: float | None
    seed: int
    val: Iterable[Any] | None
    example_inputs: ExampleInputs
    checkpoint: str | Path | None
    checkpoint_every: int | None
    resume: bool
    log: str | Path | None
    progress: ProgressHook | None
    device: str | torch.device | None
    channels_last: bool | Literal["auto"]
    penalty: str | Callable[[nn.Module], Tensor] | None
    penalty_weight: float


class FitOptions(TrainingOptions, total=False):
    """All keyword arguments of `fit`."""

    objective: Callable[..., Tensor] | None


@overload
def fit(model: Result, data: Iterable[Any], **options: Unpack[FitOptions]) -> Result: ...
@overload
def fit(model: nn.Module, data: Iterable[Any], **options: Unpack[FitOptions]) -> FitResult: ...
def fit(
    model: nn.Module | Result,
    data: Iterable[Any],
    *,
    objective: Callable[..., Tensor] | None = None,
    penalty: str | Callable[[nn.Module], Tensor] | None = None,
    penalty_weight: float = 1e-4,
    epochs: int = 1,
    lr: float = 1e-3,
    optimizer: str = "adamw",
    weight_decay: float = 0.01,
    momentum: float = 0.9,
    warmup: float = 0.05,
    clip: float | None = None,
    seed: int = 0,
    val: Iterable[Any] | None = None,
    example_inputs: ExampleInputs = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    log: str | Path | None = None,
    progress: ProgressHook | None = None,
    device: str | torch.device | None = None,
    channels_last: bool | Literal["auto"] = "auto",
) -> FitResult | Result:
    """Train a copy of a network.

    Example:
        >>> x, y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
        >>> x[:, 0] += 4 * y
        >>> trained = fit(nn.Linear(4, 2), [(x, y)] * 8, epochs=5, lr=0.1)
        >>> trained.history[-1]["loss"] < trained.history[0]["loss"], trained.steps
        (True, 40)

    Args:
        model: stays as it is. Parameters that require no gradient are not trained.
        data: batches that can be read again for each epoch: a DataLoader, a list. A batch is a tensor, a dict of keyword inputs, or
            inputs followed by the target. A DataLoader's own generator is seeded for each epoch, and put back at the end.
        objective: ``(outputs, target) -> loss``, or ``(model, batch) -> loss`` where the first parameter is called ``model``; default
            cross-entropy.
        penalty: what makes whole channels small, added to the loss: ``"bn_l1"``, ``"group_lasso"``, or ``model -> loss``. Prune afterwards.
        penalty_weight: what it is multiplied with, above 0.
        epochs: passes over the data, at least 1.
        lr: peak learning rate; it rises linearly, then falls as half a cosine, step by step.
        optimizer: ``"adamw"`` or ``"sgd"``.
        weight_decay: not applied to biases and norms.
        momentum: of SGD.
        warmup: fraction of the steps in which the rate rises, in [0, 1).
        clip: largest norm of the gradient of all parameters together; None does not clip.
        seed: decides the order of epoch k and its random numbers in torch, together with k alone.
        val: batches for loss and top-1 accuracy after each epoch, in eval mode.
        example_inputs: a tuple or dict that says how many items of a batch are inputs; default: all but the last.
        checkpoint: a folder to save into after each epoch.
        checkpoint_every: save after every so many steps, too.
        resume: continue from the checkpoint where there is one; ends in the weights of an uninterrupted run, bit for bit on the same
            machine. The data must be the same, and its randomness must come from torch.
        log: a file that gets one line of JSON for each epoch, none twice.
        progress: called with steps done and steps in total.
        device: to train on; default: where the network is.
        channels_last: memory layout of convolutions; ``"auto"`` uses channels-last wherever the forward pass takes it.

    Returns:
        A `FitResult`; for a `Result`, the `Result` with the trained network in it.

    Raises:
        SourceError: the data is empty, can be read only once, or has no target or labels beyond the network's outputs.
        UsageError: an argument outside its range, nothing to train, or a loss that is not finite (the step is named).
        RunFolderError: a checkpoint that is already there, does not fit, or cannot be written.
    """
    network = model.model if isinstance(model, Result) else model
    if epochs < 1 or not 0 <= warmup < 1 or (clip is not None and not clip > 0) or (checkpoint_every is not None and checkpoint_every < 1):
        raise UsageError("training needs epochs >= 1, warmup in [0, 1), clip > 0 and checkpoint_every >= 1")
    where = next((p.device for p in network.parameters()), torch.device("cpu"))
    target_device = torch.device(device) if device is not None else where
    folder = Path(checkpoint) if checkpoint is not None else None
    if folder is not None and not resume and checkpoints.exists(folder):
        raise RunFolderError(f"{folder} already holds a checkpoint: continue it with resume=True, or name another folder")
    with own_randomness(data, target_device):
        steps = count_batches(data)
        copied = copy.deepcopy(network).to(target_device)
        opt = make_optimizer(copied, name=optimizer, lr=lr, weight_decay=weight_decay, momentum=momentum)
        settings = {"objective": name_of(objective), "epochs": epochs, "steps": steps, "lr": lr, "optimizer": optimizer, "warmup": warmup}
        settings |= {"weight_decay": weight_decay, "momentum": momentum, "clip": clip, "seed": seed}
        settings |= getattr(objective, "settings", {})
        if penalty is not None:
            settings |= {"penalty": penalty if isinstance(penalty, str) else name_of(penalty), "penalty_weight": penalty_weight}
        trained_too = _prepare(objective, copied, data, example_inputs, target_device)
        if trained_too is not None and list(trained_too.parameters()):
            opt.add_param_group({"params": list(trained_too.parameters()), "weight_decay": weight_decay})
        run = _Run(
            model=copied,
            optimizer=opt,
            objective=as_objective(objective),
            example_inputs=example_inputs,
            device=target_device,
            lr=lr,
            warmup=warmup,
            clip=clip,
            penalty=as_penalty(penalty, penalty_weight),
            total=epochs * steps,
            channels_last=None if channels_last == "auto" else channels_last,
        )
        state = Progress(log_start=size_of(log) if log is not None else None)
        generators: dict[str, Tensor] = {}
        if folder is not None and resume and checkpoints.exists(folder):
            state, generators = checkpoints.restore(folder, copied, opt, settings)
            if log is not None:
                state.log_start = rewrite_records(log, state.log_start, state.history)
        if run.channels_last is not None:
            set_layout(copied, run.channels_last, optimizer=opt)
        save = None if folder is None else lambda: checkpoints.save(folder, copied, opt, state, settings)
        started = time.perf_counter() - state.seconds
        while state.epoch < epochs:
            seed_epoch(data, seed, state.epoch, target_device)
            _epoch(run, data, state, generators, steps=steps, save=save, every=checkpoint_every, progress=progress, start=started)
            generators = {}
            record = _record(run, state, name_of(objective), val, started)
            state.history.append(record)
            state.epoch, state.step, state.loss_sum, state.samples = state.epoch + 1, 0, 0.0, 0
            if save is not None:
                save()
            if log is not None:
                append_record(log, record)
    if run.channels_last:
        set_layout(copied, False)
    copied.zero_grad(set_to_none=True)
    for mine, theirs in zip(copied.modules(), network.modules(), strict=True):
        mine.training = theirs.training
    copied.to(where)
    if isinstance(model, Result):
        return model.with_(model=copied)
    return FitResult(copied, tuple(state.history), state.seconds, epochs * steps)


def _prepare(objective: Any, model: nn.Module, data: Iterable[Any], example_inputs: ExampleInputs, device: torch.device) -> nn.Module | None:
    if not hasattr(objective, "prepare"):
        return None
    torch.manual_seed(0)
    return objective.prepare(model, take_apart(next(iter(data)), example_inputs))


def _epoch(
    run: _Run,
    data: Iterable[Any],
    state: Progress,
    generators: dict[str, Tensor],
    *,
    steps: int,
    save: Callable[[], None] | None,
    every: int | None,
    progress: ProgressHook | None,
    start: float,
) -> None:
    """Train for the rest of the epoch that ``state`` is in."""
    run.model.train()
    batches = iter(data)
    for _ in range(state.step):  # what was trained on before the interruption
        next(batches)
    if generators:
        torch.set_rng_state(generators["cpu"])
        if "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], run.device)
    for index, raw in enumerate(batches, start=state.step):
        batch = run.prepare(raw)
        loss = run.step(batch, state.epoch * steps + index, f"step {index + 1} of epoch {state.epoch + 1}")
        n = samples_of(batch)
        state.step, state.loss_sum, state.samples = index + 1, state.loss_sum + loss * n, state.samples + n
        state.seconds = time.perf_counter() - start
        if save is not None and every is not None and state.step % every == 0 and state.step < steps:
            save()
        if progress is not None:
            progress(min(state.epoch * steps + state.step, run.total), run.total)
    if state.samples == 0:
        raise SourceError(f"the data is empty in epoch {state.epoch + 1}: it must be readable again and again")


def _record(run: _Run, state: Progress, objective: str, val: Iterable[Any] | None, started: float) -> dict[str, Any]:
    """The epoch's line: training loss, and how the network does on validation data."""
    record: dict[str, Any] = {"epoch": state.epoch + 1, "objective": objective, "loss": state.loss_sum / state.samples}
    record["lr"] = run.optimizer.param_groups[0]["lr"]
    if val is not None:
        record |= validate(run, val)
    state.seconds = time.perf_counter() - started
    record["seconds"] = round(state.seconds, 3)
    return record


def validate(run: _Run, val: Iterable[Any]) -> dict[str, float]:
    """Mean loss over the samples of ``val``, and top-1 accuracy where targets are class indices; in eval mode, without gradients."""
    run.model.eval()
    loss = hits = samples = judged = 0.0
    with torch.no_grad():
        for raw in val:
            batch = run.prepare(raw)
            n = samples_of(batch)
            loss, samples = loss + n * run.objective(run.model, batch).item(), samples + n
            if isinstance(batch.target, Tensor) and not batch.target.is_floating_point():
                z_NC = logits_of(run.model(*batch.args, **batch.kwargs))
                if z_NC.dim() > 1 and z_NC.argmax(1).shape == batch.target.shape:
                    hits, judged = hits + float((z_NC.argmax(1) == batch.target).sum()), judged + batch.target.numel()
    if samples == 0:
        raise SourceError("the validation data is empty: not one batch came out of it")
    return {"val_loss": loss / samples} | ({"val_accuracy": hits / judged} if judged else {})
