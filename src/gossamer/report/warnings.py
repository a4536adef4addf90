"""What a reader must know before any other figure: slower, larger, less accurate, nothing changed."""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.report import figures
from gossamer.report.schema import Accuracy, Measured, Parity, StepReport, Storage, Target

DROP = 0.01
"""Accuracy, as a fraction of 1, that may be lost, or differ between simulation and runtime, without a warning."""

WIDE = 0.10
"""Width of a 95% interval above which an accuracy says little."""

UNFAITHFUL_DB = 3.0
"""By how much the executed integers may be further from the original than the simulated ones, on the same samples.

File against simulation alone would not do: rounding errors of 1e-6 flip codes, and a deep network amplifies them until two faithful runs are
as far from each other as each is from the original.
"""


def warnings_for(
    before: Measured,
    after: Measured,
    parity: Parity | None = None,
    *,
    simulated: Accuracy | None = None,
    steps: Sequence[StepReport] = (),
    budget: Sequence[Target] = (),
    storage: Storage | None = None,
    drop: float = DROP,
) -> list[str]:
    """One line for each thing that did not turn out as a reader would assume, the gravest first; a slow-down comes before all else.

    Examples:
        >>> m = dict(params=10, macs=10, peak_activation_bytes=10)
        >>> warnings_for(Measured(size_bytes=1000, **m), Measured(size_bytes=2000, **m))[0]
        'larger than the original: 2.00 kB against 1.00 kB (2.00 x)'

    Args:
        before, after: the original and the compressed artefact.
        parity: how well the files agree with each other and with their networks.
        simulated: top-1 of the compressed network in torch.
        steps: what was done.
        budget: what was asked for.
        storage: the coded weights file, where weights are sparse or shared.
        drop: accuracy that may be lost without a warning, as a fraction of 1.

    Returns:
        Lines without a full stop, starting in lower case; none where all is as it should be.
    """
    lines = [*_slower(before, after), *_missed(budget), *_larger(before, after), *_less_accurate(before, after, drop)]
    return [*lines, *_unfaithful(after, parity, simulated), *_nothing_done(before, steps), *_few(after), *_only_smaller(after, storage)]


def _slower(before: Measured, after: Measured) -> list[str]:
    b, a = before.latency_ms, after.latency_ms
    if b is None or a is None or a.median <= b.median:
        return []
    noise = f"; within the original's own spread of {figures.spread(b)}" if a.median <= b.p90 else ""
    return [
        f"slower than the original: median {figures.milliseconds(a.median)} against {figures.milliseconds(b.median)} "
        f"({figures.ratio(a.median, b.median)}; {a.runtime}, {figures.plural(a.threads, 'thread')}, batch {a.batch}){noise}"
    ]


def _missed(budget: Sequence[Target]) -> list[str]:
    return [
        f"the budget is missed: {t.name} {target_value(t, t.reached)}, at most {target_value(t, t.limit)} was asked for"
        for t in budget
        if not t.met
    ]


def _larger(before: Measured, after: Measured) -> list[str]:
    lines = []
    for what, b, a, unit in (
        ("larger than the original", before.size_bytes, after.size_bytes, figures.size),
        ("more activation memory than the original", before.peak_activation_bytes, after.peak_activation_bytes, figures.size),
        ("more multiply-adds than the original", before.macs, after.macs, figures.amount),
    ):
        if a > b:
            lines.append(f"{what}: {unit(a)} against {unit(b)} ({figures.ratio(a, b)})")
    return lines


def _less_accurate(before: Measured, after: Measured, drop: float) -> list[str]:
    b, a = before.accuracy, after.accuracy
    if a is None:
        return ["accuracy was not measured: the data has no labels"]
    if b is None or b.value - a.value <= drop + 1e-9:
        return []
    fell = figures.hundredths((b.value - a.value) * 100)
    within = "within" if a.value >= b.interval[0] else "below"
    return [
        f"less accurate than the original by {fell} points: {figures.top1(a)} against {figures.top1(b)} top-1 "
        f"(n = {a.n}; {within} the original's 95% interval, {figures.interval(b).split(',')[0]})"
    ]


def _unfaithful(after: Measured, parity: Parity | None, simulated: Accuracy | None) -> list[str]:
    a = after.accuracy
    if a is not None and simulated is not None and abs(a.value - simulated.value) > DROP + 1e-9:
        return [
            f"the runtime's integers give {figures.top1(a)} top-1, the simulation {figures.top1(simulated)}: "
            "the kernels of this CPU compute something else, see the target option of quantize"
        ]
    if parity is None or parity.simulation_to_original_db is None or parity.artefact_to_original_db is None:
        return []
    if parity.artefact_to_original_db < parity.simulation_to_original_db - UNFAITHFUL_DB:
        return [
            f"the runtime's integers are further from the original ({figures.decibels(parity.artefact_to_original_db)}) than the simulation "
            f"({figures.decibels(parity.simulation_to_original_db)}): "
            "the kernels of this CPU compute something else, see the target option of quantize"
        ]
    return []


def _nothing_done(before: Measured, steps: Sequence[StepReport]) -> list[str]:
    lines, macs, params = [], before.macs, before.params
    for i, step in enumerate(steps, start=1):
        if step.step == "prune" and (step.macs, step.params) == (macs, params):
            lines.append(
                f"step {i}, prune, removed nothing: {len(step.notes)} notes tell why" if step.notes else f"step {i}, prune, removed nothing"
            )
        macs, params = step.macs, step.params
    return lines


def _only_smaller(after: Measured, storage: Storage | None) -> list[str]:
    if storage is None:
        return []
    zeros = storage.zeros / max(storage.weights, 1)
    what = f"{figures.percent(zeros)} of the weights are zero" if zeros > 0.01 else "weights share a few values"
    return [
        f"{what}: that makes {storage.file} smaller ({figures.size(storage.size_bytes)}), not the ONNX file ({figures.size(after.size_bytes)}), "
        "and neither ONNX Runtime faster nor its memory less: it computes with every weight"
    ]


def _few(after: Measured) -> list[str]:
    a = after.accuracy
    if a is None or a.interval[1] - a.interval[0] <= WIDE:
        return []
    return [f"accuracy rests on {a.n} items: its 95% interval is {(a.interval[1] - a.interval[0]) * 100:.0f} points wide"]


def target_value(target: Target, value: float) -> str:
    """A figure of a budget line in that line's unit.

    Examples:
        >>> target_value(Target(name="size", limit=1e6, reached=9e5, unit="bytes", met=True), 1e6)
        '1.00 MB'
    """
    match target.unit:
        case "ms":
            return figures.milliseconds(value)
        case "bytes":
            return figures.size(value)
        case "MACs":
            return f"{figures.amount(value)} MACs"
        case "of 1":
            return figures.points(value).lstrip("+")
        case unit:
            return f"{figures.digits(value)} {unit}".rstrip()
