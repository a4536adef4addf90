"""The one training loop: seeded, resumable to the same weights, and on a copy of the network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import Tensor, nn

from gossamer.errors import RunFolderError, UsageError
from gossamer.plan import apply_structure
from gossamer.result import ExampleInputs, Result
from gossamer.training import checkpoint as checkpoints
from gossamer.training.averaging import Best, make_average
from gossamer.training.checkpoint import Parts, Progress
from gossamer.training.constraints import Constraints, chained
from gossamer.training.epoch import Epoch
from gossamer.training.feeding import count_batches, own_randomness
from gossamer.training.interruption import TrainingStopped, stop_on_sigterm
from gossamer.training.layout import set_layout
from gossamer.training.metrics import as_metrics
from gossamer.training.objectives import as_objective, name_of
from gossamer.training.optimizers import make_optimizer, state_bytes
from gossamer.training.options import FitOptions, FitResult, Metrics, Precision, ProgressHook, check_options
from gossamer.training.penalties import as_penalty
from gossamer.training.placement import placed
from gossamer.training.precision import make_scaler, warn_where_slow
from gossamer.training.records import append_record, rewrite_records, size_of
from gossamer.training.rematerialization import MemoryReport, plan_memory
from gossamer.training.stepping import Stepper
from gossamer.training.trackers import trackers
from gossamer.training.validation import validate

if TYPE_CHECKING:
    from gossamer.parallel import Parallel


@overload
def fit(model: Result, data: Iterable[Any], **options: Unpack[FitOptions]) -> Result: ...
@overload
def fit(model: nn.Module, data: Iterable[Any], **options: Unpack[FitOptions]) -> FitResult: ...
def fit(
    model: nn.Module | Result,
    data: Iterable[Any],
    *,
    objective: str | Callable[..., Tensor] | None = None,
    penalty: str | Callable[[nn.Module], Tensor] | None = None,
    penalty_weight: float = 1e-4,
    epochs: int = 1,
    lr: float = 1e-3,
    optimizer: str = "adamw",
    weight_decay: float = 0.01,
    momentum: float = 0.9,
    warmup: float = 0.05,
    layer_decay: float = 1.0,
    clip: float | None = None,
    accumulate: int = 1,
    ema: float | None = None,
    precision: Precision = "fp32",
    seed: int = 0,
    val: Iterable[Any] | None = None,
    metrics: Metrics = (),
    patience: int | None = None,
    monitor: str = "val_loss",
    example_inputs: ExampleInputs = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    log: str | Path | None = None,
    tensorboard: str | Path | None = None,
    mlflow: str | None = None,
    progress: ProgressHook | None = None,
    device: str | torch.device | None = None,
    channels_last: bool | Literal["auto"] = "auto",
    memory_budget: str | int | None = None,
    measure_memory: bool = False,
    optimizer_in_backward: bool = False,
    after_step: Callable[[nn.Module], None] | None = None,
    parallel: Parallel | None = None,
) -> FitResult | Result:
    """Train a copy of a network.

    Examples:
        >>> x, y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
        >>> x[:, 0] += 4 * y
        >>> trained = fit(nn.Linear(4, 2), [(x, y)] * 8, epochs=5, lr=0.1)
        >>> trained.history[-1]["loss"] < trained.history[0]["loss"], trained.steps
        (True, 40)

    Args:
        model: stays as it is. Parameters that require no gradient are not trained. Of a `Result`, zeros of masks stay zero and weights
            that share a value move together.
        data: batches that can be read again for each epoch: a DataLoader (with workers, too), a list. A batch is a tensor, a dict of keyword
            inputs, or inputs followed by the target. A DataLoader's own generator is seeded for each epoch, and put back at the end.
        objective: ``(outputs, target) -> loss``, or ``(model, batch) -> loss`` where the first parameter is called ``model``; or
            ``"cross_entropy"`` (the default), ``"mse"``, ``"l1"``, ``"huber"``, ``"bce"``.
        penalty: what makes whole channels small, added to the loss: ``"bn_l1"``, ``"group_lasso"``, or ``model -> loss``. Prune afterwards.
        penalty_weight: what it is multiplied with, above 0.
        epochs: passes over the data, at least 1.
        lr: peak learning rate; it rises linearly, then falls as half a cosine, step by step.
        optimizer: ``"adamw"``, ``"sgd"``, ``"adafactor"``, or ``"adamw8bit"`` with bitsandbytes.
        weight_decay: not applied to biases and norms.
        momentum: of SGD.
        warmup: fraction of the steps in which the rate rises, in [0, 1).
        layer_decay: what the rate is multiplied by for each block between a block and the output, in (0, 1].
        clip: largest norm of the gradient of all parameters together; None does not clip.
        accumulate: batches of one optimiser step, at least 1; their samples count alike, as in one large batch (batch norm still sees each
            batch alone).
        ema: decay of an exponential moving average of the weights, in (0, 1); it is validated and returned in place of the last weights.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (with a gradient scaler) for what autocast runs in half precision. A CPU without
            instructions for it is slower in it: that is a warning.
        seed: decides the order of epoch k and its random numbers in torch, together with k alone.
        val: batches for the loss, top-1 accuracy and ``metrics`` after each epoch, in eval mode.
        metrics: ``"accuracy"``, ``"top5"``, ``"mse"``, ``"mae"``, or name -> ``(outputs, target) -> number``.
        patience: stop after so many epochs in which ``monitor`` was not better, and return the best epoch's weights; needs ``val``.
        monitor: ``"val_loss"``, ``"val_accuracy"`` or ``"val_NAME"``; losses and errors are better when smaller.
        example_inputs: a tuple or dict that says how many items of a batch are inputs; default: all but the last.
        checkpoint: a folder to save into after each epoch, and on SIGTERM, which then ends the process with exit code 0. The last two are
            kept, with checksums: where the last is damaged, the one before is used.
        checkpoint_every: save after every so many optimiser steps, too.
        resume: continue from the checkpoint where there is one; ends in the weights of an uninterrupted run, bit for bit on the same
            machine. The data must be the same, and its randomness must come from torch.
        log: a file that gets one line of JSON for each epoch, none twice.
        tensorboard: a folder for event files (``gossamer[tensorboard]``).
        mlflow: name of an experiment (``gossamer[mlflow]``).
        progress: called with optimiser steps done and in total.
        device: to train on; default: where the network is.
        channels_last: memory layout of convolutions; ``"auto"`` uses channels-last wherever the forward pass takes it.
        memory_budget: ``"400MB"`` or bytes that weights, gradients, optimiser state and activations may take at their peak. Blocks are then
            computed twice where that costs least; running statistics, dropout and gradients stay those of the plain run.
        measure_memory: measure the peak of a step, as ``memory_budget`` does, without a budget.
        optimizer_in_backward: update each parameter as soon as its gradient is there and free it. Not with clipping or accumulation.
        after_step: called with the network in training after each optimiser step, under ``no_grad``; the step's gradients are still there. Where
            it is a module, its state is part of the checkpoints.
        parallel: over several processes, which torchrun starts: ``Parallel(data=2)``, ``Parallel(data=2, shard=True)``. A batch of ``data`` is
            the whole batch: each process takes its part, and all of them together compute what one would (see docs/parallel.md). All processes
            return the same; the first writes files and draws progress.

    Returns:
        A `FitResult`; for a `Result`, the `Result` with the trained network in it.

    Raises:
        SourceError: the data is empty, can be read only once, or has no target or labels beyond the network's outputs.
        UsageError: an argument outside its range, nothing to train, or a loss that is not finite (the step is named; the last checkpoint
            stays).
        BudgetError: the memory budget cannot be met; the smallest reachable peak is named.
        RunFolderError: a checkpoint that is already there, does not fit, or cannot be written (a full disk: the last good one stays).
        TrainingStopped: SIGTERM came and the state is saved; a SystemExit with code 0.
        PeerLost: another process of a parallel training ended.
    """
    network = model.model if isinstance(model, Result) else model
    check_options(
        epochs=epochs,
        warmup=warmup,
        clip=clip,
        checkpoint_every=checkpoint_every,
        accumulate=accumulate,
        ema=ema,
        precision=precision,
        patience=patience,
        val=val,
        optimizer_in_backward=optimizer_in_backward,
    )
    settings: dict[str, Any] = {"objective": name_of(objective), "epochs": epochs, "lr": lr, "optimizer": optimizer, "warmup": warmup}
    settings |= {"weight_decay": weight_decay, "momentum": momentum, "clip": clip, "seed": seed, "accumulate": accumulate, "ema": ema}
    settings |= {"layer_decay": layer_decay, "precision": precision, "patience": patience, "monitor": monitor}
    settings |= getattr(objective, "settings", {})
    if penalty is not None:
        settings |= {"penalty": penalty if isinstance(penalty, str) else name_of(penalty), "penalty_weight": penalty_weight}
    where = next((p.device for p in network.parameters()), torch.device("cpu"))
    target_device = torch.device(device) if device is not None else where
    folder = Path(checkpoint) if checkpoint is not None else None
    with ExitStack() as stack:
        placement = stack.enter_context(placed(parallel, target_device))
        target_device = placement.on(target_device)
        warn_where_slow(target_device, precision)
        placement.check(
            settings | {"memory_budget": memory_budget, "optimizer_in_backward": optimizer_in_backward, "after_step": after_step}
        )
        resume = resume or placement.restarted
        if folder is not None and not resume and checkpoints.exists(folder):
            raise RunFolderError(f"{folder} already holds a checkpoint: continue it with resume=True, or name another folder")
        if not placement.first:
            log, tensorboard, mlflow, progress = None, None, None, None
        stack.enter_context(own_randomness(data, target_device))
        batches = count_batches(data)
        data = placement.share(data)
        val = placement.share(val) if val is not None else None
        settings["steps"] = batches
        steps = -(-batches // accumulate)
        copied = apply_structure(network, []).to(target_device)
        constraints = Constraints(model if isinstance(model, Result) else None, copied)

        def rebuild() -> nn.Module:
            again = apply_structure(network, []).to(target_device)
            Constraints(model if isinstance(model, Result) else None, again)
            return again

        run = Stepper(
            model=copied,
            optimizer=None,  # type: ignore[arg-type]
            objective=as_objective(objective),
            example_inputs=example_inputs,
            device=target_device,
            lr=lr,
            warmup=warmup,
            clip=clip,
            penalty=as_penalty(penalty, penalty_weight),
            total=epochs * steps,
            channels_last=None if channels_last == "auto" else channels_last,
            placement=placement,
            precision=precision,
            average=make_average(copied, ema) if ema is not None else None,
            scaler=make_scaler(target_device, precision),
            after_step=chained(constraints.hold, after_step),
        )
        adapters = _prepare(run, data, seed)
        placement.wrap(run, data, adapters)
        run.optimizer = make_optimizer(
            run.model,
            name=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            layer_decay=layer_decay,
            extra=adapters.parameters() if adapters is not None else (),
        )
        extra_modules = {"ema": run.average, "adapters": adapters, "after_step": after_step if isinstance(after_step, nn.Module) else None}
        best = Best(monitor, patience)
        parts = Parts(run.model, run.optimizer, {k: m for k, m in extra_modules.items() if m is not None}, run.scaler, best.state)
        state = Progress(log_start=size_of(log) if log is not None else None)
        generators: dict[str, Tensor] = {}
        if folder is not None and resume and checkpoints.exists(folder):
            state, generators = placement.restore(folder, parts, settings)
            best.state = parts.best
            if log is not None:
                state.log_start = rewrite_records(log, state.log_start, state.history)
        if run.channels_last is not None:
            set_layout(run.model, run.channels_last, optimizer=run.optimizer)
        memory: MemoryReport | None = None
        if memory_budget is not None or measure_memory:
            memory = stack.enter_context(
                plan_memory(run, data, memory_budget, optimizer_in_backward=optimizer_in_backward, accumulates=accumulate > 1)
            )
        if optimizer_in_backward:
            run.use_backward_hooks()
            stack.callback(run.close)
        tracked = stack.enter_context(trackers(tensorboard, mlflow, settings))
        stop = stack.enter_context(stop_on_sigterm(folder is not None))

        def save() -> None:
            if folder is not None:
                parts.best = best.state
                placement.save(folder, parts, state, settings)

        epoch = Epoch(run, data, state, batches, accumulate, save, checkpoint_every, progress, stop, folder)
        started = time.perf_counter() - state.seconds
        judged = as_metrics(metrics)
        while state.epoch < epochs and not best.exhausted(state.history):
            placement.seed(data, seed, state.epoch, target_device)
            epoch.train(generators, started)
            generators = {}
            record: dict[str, Any] = {"epoch": state.epoch + 1, "objective": name_of(objective), "loss": state.loss_sum / state.samples}
            record["lr"] = run.optimizer.param_groups[-1]["lr"]
            current = run.average.module if run.average is not None else run.model
            if val is not None:
                record |= validate(run, current, val, judged)
            if patience is not None:
                if monitor not in record:
                    raise UsageError(
                        f"monitor={monitor!r} is not measured, these are: {', '.join(k for k in record if k.startswith('val_'))}"
                    )
                if best.better(record, state.history):
                    best.keep(placement.state(current))
            state.seconds = time.perf_counter() - started
            record["seconds"] = round(state.seconds, 3)
            state.history.append(record)
            state.epoch, state.step, state.loss_sum, state.samples = state.epoch + 1, 0, 0.0, 0
            save()
            if log is not None:
                append_record(log, record)
            tracked.record(record)
            if folder is not None and placement.any(stop.set):
                raise TrainingStopped(folder)
        trained = placement.whole(run.average.module if run.average is not None else run.model, rebuild)
    if patience is not None:
        trained.load_state_dict(best.state)
    if run.channels_last:
        set_layout(trained, False)
    trained.zero_grad(set_to_none=True)
    codebooks = constraints.release(trained)
    for mine, theirs in zip(trained.modules(), network.modules(), strict=True):
        mine.training = theirs.training
    trained.to(where)
    if isinstance(model, Result):
        return constraints.onto(model, trained, codebooks)
    return FitResult(
        trained,
        tuple(state.history),
        state.seconds,
        state.epoch * steps,
        optimizer_state_bytes=state_bytes(run.optimizer),
        best_epoch=best.epoch(state.history) if patience is not None else None,
        memory=memory,
    )


def _prepare(run: Stepper, data: Iterable[Any], seed: int) -> nn.Module | None:
    """What the objective trains besides the network (adapters), made from the first batch."""
    holder = run.objective
    if not hasattr(holder, "prepare"):
        return None
    batch = run.prepare(next(iter(data)))
    torch.manual_seed(seed)  # after the loader, which may draw from torch
    made: nn.Module | None = holder.prepare(run.model, batch)
    return made
