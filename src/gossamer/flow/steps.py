"""Run one recipe step on a network; every technique is called here and nowhere else in the flow."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.flow.job import Job, Progress
from gossamer.flow.together import rank
from gossamer.plan import Plan
from gossamer.recipe import Cluster, Decouple, Distill, Factorize, Fit, Prune, Qat, Quantize, Sparsify
from gossamer.result import Profile, Result
from gossamer.training.averaging import Best


def run_step(
    step: object, model: nn.Module, plan: Plan, before: Profile, job: Job, *, folder: Path | None, progress: Progress | None
) -> Result:
    """Apply one step.

    Args:
        step: a `Prune`, `Factorize`, `Decouple`, `Sparsify`, `Cluster`, `Fit`, `Distill`, `Quantize` or `Qat`.
        model: the network so far; not changed.
        plan: of the steps so far: training keeps its zeros and its shared weights.
        before: its profile.
        job: data, seed, and the original network, which teaches in `Distill`.
        folder: where training writes checkpoints to resume from, or None.
        progress: called with stage, done, total.

    Returns:
        A `Result` whose plan holds this step's edits only.
    """

    def tick(done: int, total: int) -> None:
        if progress:
            progress(getattr(step, "kind", ""), done, total)

    match step:
        case Prune():
            return _prune(step, model, job, tick)
        case Factorize():
            from gossamer.lowrank import factorize

            options = step.model_dump()
            return factorize(
                model, job.example_inputs, calibration=job.calibration, threads=job.threads, seed=job.seed, progress=tick, **options
            )
        case Decouple():
            from gossamer.decoupling import decouple

            options = step.model_dump()
            return decouple(
                model, job.example_inputs, calibration=job.calibration, threads=job.threads, seed=job.seed, progress=tick, **options
            )
        case Sparsify():
            return _sparsify(step, model, job, folder, tick)
        case Cluster():
            from gossamer.sharing import cluster

            return cluster(
                model,
                bits=step.bits,
                groups=step.groups,
                scope=step.scope,
                ignore=step.ignore,
                example_inputs=job.example_inputs,
                progress=tick,
            )
        case Fit():
            return _train(step, model, plan, before, job, folder, tick)
        case Quantize():
            from gossamer.quantization import quantize

            return quantize(
                model,
                job.example_inputs,
                calibration=None if step.dynamic or step.weight_only else job.calibration,
                weight_bits=step.weight_bits,
                activation_bits=step.activation_bits,
                average_bits=step.average_bits,
                dynamic=step.dynamic,
                weight_only=step.weight_only,
                group_size=step.group_size,
                step=step.step,
                granularity=step.granularity,
                observer=step.observer,
                rounding=step.rounding,
                equalize=step.equalize,
                bias_correction=step.bias_correction,
                target=step.target,
                prefer=step.prefer,
                ignore=step.ignore,
                progress=tick,
            )
        case Qat():
            return _qat(step, model, plan, before, job, folder, tick)
    raise AssertionError(f"unknown step {step!r}")


def _prune(step: Prune, model: nn.Module, job: Job, tick: Callable[[int, int], None]) -> Result:
    from gossamer.pruning import prune, prune_in_steps

    options: dict[str, Any] = {
        "ratio": step.ratio,
        "macs": step.macs,
        "params": step.params,
        "latency": step.latency,
        "importance": step.importance,
        "calibration": job.calibration,
        "compensate": step.compensate,
        "reestimate_bn": step.reestimate_bn,
        "ignore": step.ignore,
        "round_to": step.round_to,
        "scope": step.scope,
        "attention": step.attention,
        "seed": job.seed,
        "progress": tick,
    }
    if step.schedule == "one_shot" and not step.epochs:
        return prune(model, job.example_inputs, **options)

    notes = []

    def recover(network: nn.Module, number: int) -> nn.Module:
        from gossamer.distillation import distill

        if not step.epochs:
            return network
        training: Any = job.training
        trained = distill(
            network,
            job.model,
            training,
            epochs=step.epochs,
            lr=step.lr,
            seed=job.seed + number,
            parallel=job.parallel,
            **_judged(step, job),
        )
        notes.extend(_stopped(step, trained.history))
        return trained.model.eval()

    result = prune_in_steps(model, job.example_inputs, schedule=step.schedule, steps=step.steps, recover=recover, **options)
    return result.with_(notes=(*result.notes, *notes))


def _sparsify(step: Sparsify, model: nn.Module, job: Job, folder: Path | None, tick: Callable[[int, int], None]) -> Result:
    from gossamer.sparsity import sparsify, train_sparse

    options: dict[str, Any] = {
        "sparsity": step.sparsity,
        "l0": step.l0,
        "l1": step.l1,
        "pattern": step.pattern,
        "scope": step.scope,
        "criterion": step.criterion,
        "ignore": step.ignore,
        "example_inputs": job.example_inputs,
        "calibration": job.calibration,
    }
    if not step.epochs or folder is None:  # without a folder it is a dry run: masks of the weights as they are
        return sparsify(model, reestimate_bn=step.reestimate_bn, progress=tick, **options)
    from gossamer.distillation import distill

    trained = train_sparse(
        model,
        job.training,
        schedule=step.schedule,
        regrow=step.regrow,
        epochs=step.epochs,
        lr=step.lr,
        seed=job.seed,
        progress=tick,
        train=lambda network, data, **more: distill(network, job.model, data, **more),
        parallel=job.parallel,
        **_kept_in(folder),
        **_judged(step, job),
        **options,
    )
    return trained.with_(notes=(*trained.notes, *_stopped(step, _logged(folder))))


def _qat(
    step: Qat, model: nn.Module, plan: Plan, before: Profile, job: Job, folder: Path | None, tick: Callable[[int, int], None]
) -> Result:
    quantised: dict[str, Any] = {
        "weight_bits": step.weight_bits,
        "activation_bits": step.activation_bits,
        "target": step.target,
        "ignore": step.ignore,
        "calibration": job.calibration,
    }
    if folder is None:  # the dry run: what training starts from
        from gossamer.quantization import quantize

        return quantize(model, job.example_inputs, **quantised)
    from gossamer.flow.quantized_training import qat

    start = Result(model=model, plan=plan, before=before, after=before, example_inputs=job.example_inputs)
    trained = qat(
        start,
        job.training,
        loss=step.loss,
        alpha=step.alpha,
        tau=step.tau,
        freeze_norms=step.freeze_norms,
        epochs=step.epochs,
        lr=step.lr,
        optimizer=step.optimizer,
        weight_decay=step.weight_decay,
        warmup=step.warmup,
        clip=step.clip,
        accumulate=step.accumulate,
        seed=job.seed,
        progress=tick,
        parallel=job.parallel,
        **quantised,
        **_kept_in(folder),
        **_judged(step, job),
    )
    added = tuple(e for e in trained.plan if e not in plan.edits)
    return trained.with_(plan=plan.model_copy(update={"edits": added}), notes=(*trained.notes, *_stopped(step, _logged(folder))))


def _kept_in(folder: Path | None) -> dict[str, Any]:
    """Where training keeps what it resumes from, and its log."""
    if folder is None:
        return {}
    return {"checkpoint": folder / "training", "resume": (folder / "training").exists(), "log": folder / "log.jsonl"}


def _judged(step: Fit | Qat | Prune | Sparsify, job: Job) -> dict[str, Any]:
    """What training is judged on after each epoch, and when it stops."""
    return {} if job.validation is None else {"val": job.validation, "patience": step.patience, "monitor": step.monitor}


def _logged(folder: Path | None) -> list[dict[str, Any]]:
    """The epochs of a training, which the first process writes down."""
    log = folder / "log.jsonl" if folder is not None and rank() == 0 else None
    return [json.loads(line) for line in log.read_text().splitlines()] if log is not None else []


def _stopped(step: Fit | Qat | Prune | Sparsify, records: Sequence[dict[str, Any]]) -> list[str]:
    """Which epoch's weights came back, where patience chose it."""
    if step.patience is None or not records:
        return []
    best = Best(step.monitor, step.patience).epoch(list(records))
    return [f"{step.kind} stopped after {len(records)} of {step.epochs} epochs, the weights are those of epoch {best}"]


def _train(step: Fit, model: nn.Module, plan: Plan, before: Profile, job: Job, folder: Path | None, tick: object) -> Result:
    start = Result(model=model, plan=plan, before=before, after=before, example_inputs=job.example_inputs)
    options: dict[str, Any] = {
        "epochs": step.epochs,
        "lr": step.lr,
        "optimizer": step.optimizer,
        "weight_decay": step.weight_decay,
        "momentum": step.momentum,
        "warmup": step.warmup,
        "layer_decay": step.layer_decay,
        "clip": step.clip,
        "accumulate": step.accumulate,
        "ema": step.ema,
        "precision": step.precision,
        "memory_budget": step.memory_budget,
        "optimizer_in_backward": step.optimizer_in_backward,
        "penalty": step.penalty,
        "penalty_weight": step.penalty_weight,
        "seed": job.seed,
        "progress": tick,
        "parallel": job.parallel,
    }
    options |= _kept_in(folder) | _judged(step, job)
    if isinstance(step, Distill):
        from gossamer.distillation import Feature, distill

        names = step.features if isinstance(step.features, dict) else {name: name for name in step.features}
        features = [Feature(mine, other, step.feature_loss, step.feature_weight) for mine, other in names.items()]
        options |= {"teacher_cache": folder / "teacher" if step.teacher_cache and folder else None}
        trained = distill(start, job.model, job.training, loss=step.loss, alpha=step.alpha, tau=step.tau, features=features, **options)
    else:
        from gossamer.training import fit

        trained = fit(start, job.training, **options)
    changed = tuple(e for e in trained.plan if e not in plan.edits)  # codebooks that were trained
    notes = (*trained.notes, *_stopped(step, _logged(folder)))
    return trained.with_(model=trained.model.eval(), plan=plan.model_copy(update={"edits": changed}), notes=notes)
