"""The main job on one page: trace, transform, recover, export, measure, report."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gossamer.errors import BudgetError, GossamerError, NothingToDo, RunFolderError, UsageError
from gossamer.flow.job import Job, Progress, check_folder, resolve, trains
from gossamer.flow.ladder import candidates, violation
from gossamer.flow.measure import Original, export_original, measure
from gossamer.flow.steps import run_step
from gossamer.flow.together import BEGUN, announce, check_parallel, follow, follow_begin, rank
from gossamer.plan import Plan, input_specs
from gossamer.recipe import Budget, Fit, Recipe
from gossamer.report.schema import Frozen, Report, StepReport
from gossamer.result import ExampleInputs, Profile, Proof, Result
from gossamer.run_folder import ONNX, REPORT, environment, load_weights, read_json, save_result, save_weights, write_bytes, write_text

if TYPE_CHECKING:
    from gossamer.parallel import Parallel


def compress(
    model: nn.Module | Any,
    data: Any,
    *,
    recipe: Any = None,
    budget: Budget | str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    calibration: Any = None,
    validation: Any = None,
    example_inputs: ExampleInputs = None,
    weights: str | Path | None = None,
    threads: int = 1,
    executorch: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    parallel: Parallel | None = None,
) -> Result:
    """Compress a trained network, export it, and measure the artefact against the original in ONNX Runtime.

    Examples:
        >>> import torch, gossamer as gs
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 3))
        >>> batches = [(torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))) for _ in range(4)]
        >>> result = gs.compress(net, batches, recipe=[gs.Quantize()])
        >>> result.report["after"]["size_bytes"] < result.report["before"]["size_bytes"]
        True

    Args:
        model: a network, or a specification (``"torchvision:mobilenet_v2"``). It is not changed.
        data: batches ``(input, ..., label)`` that can be read repeatedly, or a specification (``"digits"``, ``"imagefolder:PATH"``).
        recipe: steps (``[gs.Prune(macs=0.5), gs.Distill(), gs.Quantize()]``), a `Recipe`, or a YAML file. Default: `Quantize`,
            or, with a budget, the mildest of a ladder of recipes that meets it.
        budget: what the artefact may cost, a `Budget` or ``"latency=0.5,drop=1%"``.
        out: run folder to write; None keeps nothing on disk.
        seed: of everything random; the same seed gives the same plan and the same weights.
        calibration: batches for calibration, as ``data``; default: 512 samples of the training split.
        validation: batches that training is judged on after each epoch, as ``data``; default: where a step has ``patience``, a tenth of the
            training split, which is then not trained on.
        example_inputs: a tuple of inputs (a dict of keyword inputs) with batch 1; default: the first sample of ``data``.
        weights: state dict to load where ``model`` is a specification.
        threads: of ONNX Runtime when latency is measured.
        executorch: also write ``model.pte`` and measure it in ExecuTorch (needs the extra ``gossamer[executorch]``).
        resume: continue an interrupted run in ``out``; it ends in the same artefact.
        progress: called with stage, done, total.
        parallel: train the recipe's steps in several processes, which torchrun starts (see `gossamer.fit`). The first of them does all else.

    Returns:
        A `Result`; ``.report`` holds what ``report.json`` holds (None in all processes but the first).

    Raises:
        UsageError: bad input; nothing has been written.
        BudgetError: no artefact meets the budget; it says the best that can, and ``out`` holds that one.
    """
    job = resolve(
        model,
        data,
        recipe=recipe,
        budget=budget,
        calibration=calibration,
        validation=validation,
        example_inputs=example_inputs,
        weights=weights,
        seed=seed,
        threads=threads,
        executorch=executorch,
        parallel=parallel,
    )
    if parallel is not None:
        check_parallel(job, out)
        resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if rank() > 0:
            return _accompany(job, Path(str(out)))
    with _workplace(out, resume=resume) as folder:
        return _run(job, folder, progress)


def plan_only(model: Any, data: Any, **options: Any) -> Plan:
    """The dry run: the plan that `compress` would carry out, without training and without writing anything.

    Decided on the weights as they are: training in between would change the quantisation steps, not the structure.
    """
    progress = options.pop("progress", None)
    job = resolve(model, data, **options)
    recipe = job.recipe or candidates(job)[0]
    plan, network, profile = Plan(inputs=input_specs(job.example_inputs)), job.model, _profile(job)[0]
    for step in recipe.steps:
        if not isinstance(step, Fit):
            result = run_step(step, network, plan, profile, job, folder=None, progress=progress)
            plan, network, profile = plan + result.plan, result.model, result.after
    return plan


def _run(job: Job, folder: Path, progress: Progress | None) -> Result:
    _claim(job, folder)
    finished = _finished(job, folder)
    if finished is not None:
        return finished
    profile, frozen = _profile(job)
    original = export_original(job, profile, frozen, folder / "checkpoints" / "original.onnx")
    tried: list[_Candidate] = []
    impossible: GossamerError | None = None
    for i, recipe in enumerate([job.recipe] if job.recipe else candidates(job)):
        place = folder / "checkpoints" / f"candidate-{i + 1}"
        try:
            tried.append(_attempt(job, recipe, original, place, progress))
        except (BudgetError, NothingToDo) as e:  # a rung of the ladder that this network does not reach
            impossible = e
            continue
        if violation(tried[-1].report) == 0:
            break
    if not tried:
        assert impossible is not None
        raise impossible
    best = min(tried, key=lambda c: violation(c.report))
    if job.executorch:
        from gossamer.flow.executorch import measure_executorch

        best.report.executorch = measure_executorch(job, best.result, folder, folder / "checkpoints")
    _publish(best, folder)
    missed = [t for t in best.report.budget if not t.met]
    if missed:
        best_can = ", ".join(f"{t.name} {t.reached:.4g} {t.unit} (limit {t.limit:.4g})" for t in missed)
        raise BudgetError(f"the budget cannot be met by {len(tried)} recipe{'s' * (len(tried) > 1)} tried; the best that can: {best_can}")
    return best.result.with_(report=best.report.model_dump(mode="json"))


def _accompany(job: Job, folder: Path) -> Result:
    """What all processes but the first do: train with it, and take every finished step from its checkpoint."""
    assert job.recipe is not None
    plan, network, before = Plan(inputs=input_specs(job.example_inputs)), job.model, _profile(job)[0]
    profile = before
    for i, step in enumerate(job.recipe.steps):
        place = _place(folder / "checkpoints" / "candidate-1", i, step)
        if trains(step) and not (place / "step.json").exists():
            follow_begin(place)
            run_step(step, network, plan, profile, job, folder=place, progress=None)
        follow(place, "step.json")
        plan, network, profile, _, _ = _load_step(job, plan, network, place)
    return Result(model=network.eval(), plan=plan, before=before, after=profile, example_inputs=job.example_inputs, source=job.source)


def _place(folder: Path, i: int, step: Any) -> Path:
    return folder / f"{i + 1}-{step.kind}"


@dataclass(frozen=True)
class _Candidate:
    recipe: Recipe
    result: Result
    report: Report
    folder: Path


def _attempt(job: Job, recipe: Recipe, original: Original, folder: Path, progress: Progress | None) -> _Candidate:
    """Carry out one recipe, step by step, each finished step a checkpoint; then export and measure."""
    plan = Plan(inputs=input_specs(job.example_inputs))
    network, profile, computed = job.model, original.profile, original.profile
    rows: list[StepReport] = []
    notes: list[str] = []
    proof: Proof | None = None
    for i, step in enumerate(recipe.steps):
        place = _place(folder, i, step)
        if not (place / "step.json").exists():
            if job.parallel is not None and trains(step):
                announce(place)
            started = time.perf_counter()
            result = run_step(step, network, plan, profile, job, folder=place, progress=progress)
            row = StepReport(
                step=step.kind,
                options=step.model_dump(mode="json"),
                params=result.after.params,
                macs=result.after.macs,
                seconds=round(time.perf_counter() - started, 2),
                proof=str(result.proof) if result.proof else None,
                notes=list(result.notes),
            )
            _save_step(result, row, place)
        plan, network, profile, row, step_proof = _load_step(job, plan, network, place)
        if step.kind not in ("quantize", "qat"):
            computed = profile
        proof = step_proof or proof
        rows.append(row)
        notes += row.notes
    whole = Result(
        model=network.eval(),
        plan=plan,
        before=original.profile,
        after=profile,
        proof=proof,
        example_inputs=job.example_inputs,
        notes=tuple(notes),
        source=job.source,
    )
    measured = folder / REPORT
    if measured.exists() and (folder / ONNX).exists():
        report = Report.model_validate_json(measured.read_text())
    else:
        report = measure(job, original, whole, recipe=recipe, path=folder / ONNX, compressed=computed, steps=rows, progress=progress)
        write_text(measured, report.model_dump_json(indent=2) + "\n")
    return _Candidate(recipe, whole, report, folder)


def _save_step(result: Result, row: StepReport, place: Path) -> None:
    """Write a finished step; ``step.json`` comes last, so that a killed run never takes half a step for a whole one."""
    from pydantic import TypeAdapter

    result.plan.save(place / "plan.json")
    save_weights(result.model, place / "model.safetensors")
    record = {
        "row": row.model_dump(mode="json"),
        "profile": TypeAdapter(Profile).dump_python(result.after, mode="json"),
        "proof": TypeAdapter(Proof).dump_python(result.proof, mode="json") if result.proof else None,
    }
    write_text(place / "step.json", json.dumps(record) + "\n")
    shutil.rmtree(place / "training", ignore_errors=True)
    (place / BEGUN).unlink(missing_ok=True)


def _load_step(job: Job, plan: Plan, network: nn.Module, place: Path) -> tuple[Plan, nn.Module, Profile, StepReport, Proof | None]:
    """Take a step from its checkpoint: fresh and resumed runs go the same way, so that they end in the same bytes."""
    from pydantic import TypeAdapter

    record = read_json(place / "step.json")
    step_plan = Plan.load(place / "plan.json")
    network = load_weights(step_plan.apply(network, values=False), place / "model.safetensors")
    proof = TypeAdapter(Proof).validate_python(record["proof"]) if record["proof"] else None
    return plan + step_plan, network, TypeAdapter(Profile).validate_python(record["profile"]), StepReport(**record["row"]), proof


def _publish(best: _Candidate, folder: Path) -> None:
    """Write the contract's files; report.json comes last and marks the run as finished."""
    from gossamer.report import write

    logs = [
        {"step": place.name, **json.loads(line)}
        for place in sorted(best.folder.iterdir())
        if (place / "log.jsonl").exists()
        for line in (place / "log.jsonl").read_text().splitlines()
    ]
    write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in logs))
    write_text(folder / "recipe.yaml", best.recipe.dump())
    write_bytes(folder / ONNX, (best.folder / ONNX).read_bytes())
    (folder / "plan.json").unlink(missing_ok=True)
    save_result(best.result, folder)
    write(best.report, folder)


def _claim(job: Job, folder: Path) -> None:
    """Record what this run was asked for, or check that a resumed run is asked for the same."""
    request, claim = job.fingerprint(), folder / "checkpoints" / "request.json"
    if not claim.exists():
        write_text(folder / "environment.json", json.dumps(environment(job.source), indent=2) + "\n")
        write_text(claim, json.dumps(request, indent=2) + "\n")
        return
    earlier = read_json(claim)
    differs = [k for k in request if earlier.get(k) != request[k]]
    if differs:
        raise RunFolderError(
            f"{folder} was started with another {', '.join(differs)}: resume with the same, or name another folder with --out"
        )


def _finished(job: Job, folder: Path) -> Result | None:
    if not (folder / REPORT).exists():
        return None
    from gossamer.report import read

    report = read(folder)
    if job.executorch and report.executorch is None:
        return None
    plan = Plan.load(folder / "plan.json")
    network = load_weights(plan.apply(job.model, values=False), folder / "model.safetensors").eval()
    before = _profile(job)[0]
    missed = [t for t in report.budget if not t.met]
    if missed:
        raise BudgetError(f"this run is finished and missed its budget: {', '.join(t.name for t in missed)}; see {folder / 'report.html'}")
    from gossamer.profiling import profile

    after = profile(network, job.example_inputs)
    return Result(
        model=network,
        plan=plan,
        before=before,
        after=after,
        example_inputs=job.example_inputs,
        source=job.source,
        report=report.model_dump(mode="json"),
    )


def _profile(job: Job) -> tuple[Profile, list[Frozen]]:
    from gossamer.trace import trace

    traced = trace(job.model, job.example_inputs)
    return traced.profile, [Frozen(group=g.name, reason=g.frozen or "") for g in traced.channels.frozen]


@contextmanager
def _workplace(out: str | Path | None, *, resume: bool) -> Iterator[Path]:
    """The run folder, or a temporary one where nothing is to stay; a run that fails before its first step leaves no folder behind."""
    if out is None:
        if resume:
            raise UsageError("resume needs the run folder: pass out=")
        with tempfile.TemporaryDirectory(prefix="gossamer-") as temporary:
            yield Path(temporary)
        return
    folder = check_folder(out, resume=resume)
    fresh = not folder.exists()
    try:
        yield folder
    except GossamerError:
        if fresh and folder.exists() and not any(folder.glob("checkpoints/candidate-*/*/step.json")):
            shutil.rmtree(folder)
        raise
