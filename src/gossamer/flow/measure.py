"""Export the original and the compressed network, run both in the runtime they ship to, and write down what that shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from gossamer import __version__
from gossamer.errors import ExportError
from gossamer.flow.job import Job, Progress
from gossamer.plan import Mask, Plan, QuantizeWeight, Share
from gossamer.recipe import LATENCY_UNITS, SIZE_UNITS, Budget, Recipe, quantity
from gossamer.report.schema import Accuracy, Frozen, Input, Latency, LayerRow, Measured, Parity, Report, StepReport, Storage, Target
from gossamer.result import Profile, Result
from gossamer.run_folder import WEIGHTS, environment, save_weights, state_of
from gossamer.sources.batches import split

if TYPE_CHECKING:
    from gossamer.profiling.latency import Benchmark, Timing

_COMPARED = 512  # samples that the simulation is compared with the file on
_APART = 0.01  # top-1, as a fraction of 1, that they may differ by


@dataclass(frozen=True)
class Original:
    """The source network, exported once: what every candidate is held against."""

    path: Path
    profile: Profile
    difference: float
    frozen: tuple[Frozen, ...]


def export_original(job: Job, profile: Profile, frozen: Sequence[Frozen], path: Path) -> Original:
    """Export the source network as float32 ONNX and check it against torch."""
    from gossamer.exporting import export

    exported = export(job.model, path, example_inputs=job.example_inputs, calibration=job.calibration)
    return Original(path, profile, exported.difference, tuple(frozen))


def measure(
    job: Job,
    original: Original,
    result: Result,
    *,
    recipe: Recipe,
    path: Path,
    compressed: Profile,
    steps: Sequence[StepReport],
    progress: Progress | None = None,
) -> Report:
    """Export ``result`` to ``path``, time both files interleaved, evaluate both on the same data, and return the report.

    Args:
        job: data and seed.
        original: the exported source network.
        result: the compressed network, with the whole plan.
        recipe: what was done.
        path: where the artefact goes.
        compressed: the profile of the compressed network before quantisation (what its layers compute).
        steps: one entry for each step.
        progress: called with stage, done, total.
    """
    from gossamer.exporting import export
    from gossamer.profiling import benchmark, evaluate, peak_activation_bytes
    from gossamer.report import warnings_for

    exported = export(result, path, example_inputs=job.example_inputs, calibration=job.calibration)
    timed = benchmark(original.path, path, example_inputs=job.example_inputs, threads=job.threads)
    evaluated = evaluate(path, job.evaluation, reference=original.path, progress=_stage(progress, "evaluate"))

    simulation = executed = None
    if exported.sqnr_db is not None:  # integers: does the runtime compute what the simulation does?
        sample = _sample(job.evaluation)
        simulation = evaluate(result.model, sample, reference=job.model, example_inputs=job.example_inputs)
        executed = evaluate(path, sample, reference=original.path)
        _check_faithful(result, path, sample, simulation, executed, job)

    def measured(which: int, profile: Profile, accuracy: Any, file: Path) -> Measured:
        row = timed.rows[which]
        return Measured(
            params=profile.params,
            macs=profile.macs,
            size_bytes=file.stat().st_size,
            peak_activation_bytes=peak_activation_bytes(file, job.example_inputs),
            latency_ms=latency_of(timed, row, timed.runtime),
            accuracy=accuracy,
        )

    before = measured(0, original.profile, _accuracy(evaluated.reference_accuracy, evaluated.n), original.path)
    after = measured(1, compressed, _accuracy(evaluated.accuracy, evaluated.n), path)
    parity = Parity(
        before_difference=original.difference,
        after_difference=exported.difference if exported.sqnr_db is None else None,
        simulation_sqnr_db=exported.sqnr_db,
        simulation_to_original_db=simulation.sqnr_db if simulation else None,
        artefact_to_original_db=executed.sqnr_db if executed else None,
        sqnr_db=evaluated.sqnr_db,
        top1_agreement=evaluated.agreement,
        n=evaluated.n,
    )
    budget = budget_lines(job.budget, before, after) if job.budget else []
    kept = stored(original, result, path.parent)
    return Report(
        gossamer=__version__,
        model=job.source or type(job.model).__name__,
        data=job.data_name,
        seed=job.seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe={"steps": [{s.kind: s.model_dump(mode="json")} for s in recipe.steps]},
        environment=environment(job.source),
        before=before,
        after=after,
        parity=parity,
        steps=list(steps),
        layers=layer_rows(original.profile, compressed, result.plan),
        frozen=list(original.frozen),
        budget=budget,
        warnings=[*warnings_for(before, after, parity, steps=steps, budget=budget, storage=kept), *job.warnings, *exported.notes],
        inputs=_inputs(path),
        preprocessing=job.preprocessing,
        storage=kept,
        simulated=_accuracy(simulation.accuracy, simulation.n) if simulation else None,
    )


def _sample(evaluation: Iterable[Any]) -> list[Any]:
    """Leading batches of the evaluation data, at least `_COMPARED` samples where there are as many."""
    kept: list[Any] = []
    samples = 0
    for batch in evaluation:
        kept.append(batch)
        samples += next((t.shape[0] for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), 1)
        if samples >= _COMPARED:
            break
    return kept


def latency_of(timed: Benchmark, row: Timing, runtime: str) -> Latency:
    """A timed row as a report has it."""
    return Latency(
        median=row.median_ms,
        p10=row.p10_ms,
        p90=row.p90_ms,
        runtime=runtime,
        threads=timed.threads,
        batch=timed.batch,
        runs=row.runs,
        ratio=row.ratio,
        ratio_p10=row.ratio_p10,
        ratio_p90=row.ratio_p90,
    )


def _check_faithful(result: Result, path: Path, sample: list[Any], simulation: Any, executed: Any, job: Job) -> None:
    """ExportError where the file's top-1 is more than a point from the simulation's on the same samples and a layer is to blame."""
    if simulation.accuracy is None or executed.accuracy is None:
        return
    apart = abs(simulation.accuracy.value - executed.accuracy.value)
    if apart <= _APART + 1e-9:
        return
    from gossamer.exporting import first_divergence

    inputs = split(sample[0], job.example_inputs)
    found = first_divergence(result.model, path, inputs.args or tuple(inputs.kwargs.values()))
    if found is None:  # codes that are off by one here and there flip the top-1 of samples that were undecided
        return
    raise ExportError(
        f"in ONNX Runtime the integers give {100 * executed.accuracy.value:.1f}% top-1, in the simulation {100 * simulation.accuracy.value:.1f}%, on "
        f"the same {executed.n} samples; the first layer that differs is {found[0]} ({found[1]:.1f} dB): its kernel saturates or is wrong on this "
        "CPU; quantize with target='avx2'"
    )


def stored(original: Original, result: Result, folder: Path) -> Storage | None:
    """What the coded weights file takes, where the plan masks or shares weights."""
    from gossamer.coding import storage

    if not any(isinstance(e, Mask | Share) for e in result.plan):
        return None
    found = storage(state_of(result.model))
    file = save_weights(result.model, folder / WEIGHTS, coded=True)
    return Storage(
        file=WEIGHTS,
        size_bytes=file.stat().st_size,
        dense_bytes=original.profile.weight_bytes,
        entropy_bytes=found.entropy_bytes,
        zeros=found.zeros,
        weights=found.numel,
    )


def _inputs(path: Path) -> list[Input]:
    """The graph's inputs as a user of the file must feed them."""
    from gossamer.profiling.runtime import DTYPES, session

    return [
        Input(name=i.name, shape=[d if isinstance(d, int) else 1 for d in i.shape], dtype=DTYPES[i.type].__name__)
        for i in session(path, 1).get_inputs()
    ]


def _stage(progress: Progress | None, stage: str) -> Any:
    return (lambda done, total: progress(stage, done, total)) if progress else None


def _accuracy(found: Any, n: int) -> Accuracy | None:
    return None if found is None else Accuracy(value=found.value, n=n, interval=found.interval)


def layer_rows(before: Profile, after: Profile, plan: Plan) -> list[LayerRow]:
    """Layers before and after, matched by name and by the order of calls under that name."""
    bits = {e.tensor: e.bits for e in plan if isinstance(e, QuantizeWeight)}
    later = _by_call(after.layers)
    rows = []
    for key, old in _by_call(before.layers).items():
        new = later.get(key)
        if new is not None:
            rows.append(
                LayerRow(
                    name=old.name,
                    op=old.op,
                    shape_before=list(old.output_shape),
                    shape_after=list(new.output_shape),
                    macs_before=old.macs,
                    macs_after=new.macs,
                    params_before=old.params,
                    params_after=new.params,
                    bits=bits.get(new.weight or ""),
                )
            )
    return rows


def _by_call(layers: Iterable[Any]) -> dict[tuple[str, str, int], Any]:
    out: dict[tuple[str, str, int], Any] = {}
    seen: dict[tuple[str, str], int] = {}
    for layer in layers:
        n = seen.get((layer.name, layer.op), 0)
        seen[layer.name, layer.op] = n + 1
        out[layer.name, layer.op, n] = layer
    return out


def budget_lines(budget: Budget, before: Measured, after: Measured) -> list[Target]:
    """Each line of the budget with its limit, what was reached, and whether that meets it."""
    lines = []
    if budget.latency is not None and before.latency_ms and after.latency_ms:
        limit = (
            quantity(budget.latency, LATENCY_UNITS, "latency")
            if isinstance(budget.latency, str)
            else budget.latency * before.latency_ms.median
        )
        reached = after.latency_ms.median
        lines.append(Target(name="latency", limit=limit, reached=reached, unit="ms", met=reached <= limit))
    if budget.size is not None:
        limit = quantity(budget.size, SIZE_UNITS, "size") if isinstance(budget.size, str) else budget.size * before.size_bytes
        lines.append(Target(name="size", limit=limit, reached=after.size_bytes, unit="bytes", met=after.size_bytes <= limit))
    if budget.macs is not None:
        limit = budget.macs * before.macs
        lines.append(Target(name="macs", limit=limit, reached=after.macs, unit="MACs", met=after.macs <= limit))
    if budget.max_drop is not None and before.accuracy and after.accuracy:
        drop = before.accuracy.value - after.accuracy.value
        lines.append(Target(name="drop", limit=budget.max_drop, reached=drop, unit="of 1", met=drop <= budget.max_drop + 1e-9))
    return lines
