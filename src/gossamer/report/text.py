"""Tables for the terminal, as plain strings of a stable width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from gossamer.report import figures
from gossamer.report.figures import NONE, amount, change, milliseconds, percent, plural, size, tail
from gossamer.report.schema import Executorch, Measured, Report, Storage
from gossamer.report.warnings import target_value

if TYPE_CHECKING:
    from gossamer.profiling import Benchmark, Evaluation, SparseKernels
    from gossamer.result import Profile, Result
    from gossamer.trace.channels import ChannelGroup, ChannelMap

WIDTH = 80
"""Columns that every table fits into."""

UNMEASURED = "not measured"
"""What stands for MACs and activations of a network that was never run."""

LAYERS = 20
"""Layers that a profile lists: the costliest, in execution order."""


def profile_table(profile: Profile, *, width: int = WIDTH) -> str:
    """A profile: totals, then the costliest layers in execution order."""
    top = sorted(range(len(profile.layers)), key=lambda i: -profile.layers[i].macs)[:LAYERS]
    most = max((layer.macs for layer in profile.layers), default=0) or 1
    rows = []
    for layer in (profile.layers[i] for i in sorted(top)):
        share = layer.macs / profile.macs if profile.macs else 0.0
        row = [
            layer.name or "(network)",
            layer.op,
            figures.shape(layer.output_shape),
            amount(layer.params),
            amount(layer.macs),
            percent(share),
        ]
        rows.append([*row, "▇" * round(8 * layer.macs / most)])
    said = [f"{amount(profile.params)} parameters", f"{size(profile.weight_bytes)} of weights"]
    if profile.measured:
        said.insert(1, f"{amount(profile.macs)} MACs")
        said.append(f"{size(profile.peak_activation_bytes)} of activations at the peak")
    else:
        said.append(f"MACs and activations {UNMEASURED}")
    parts = [wrap(", ".join(said), width)]
    if rows:
        parts.append(table(["layer", "op", "output", "params", "MACs", "share", ""], rows, right=(3, 4, 5), width=width))
    rest = len(profile.layers) - len(top)
    if rest:
        left = profile.macs - sum(profile.layers[i].macs for i in top)
        parts.append(f"… and {rest} cheaper layers with {amount(max(left, 0))} MACs")
    return "\n".join(parts)


def result_table(result: Result, *, width: int = WIDTH) -> str:
    """A result: before and after, the proof, what was left alone and why."""
    b, a = result.before, result.after
    macs = [amount(p.macs) if p.measured else UNMEASURED for p in (b, a)]
    peaks = [size(p.peak_activation_bytes) if p.measured else UNMEASURED for p in (b, a)]
    both = b.measured and a.measured
    rows = [
        ["parameters", amount(b.params), amount(a.params), change(a.params, b.params)],
        ["MACs", *macs, change(a.macs, b.macs) if both else NONE],
        ["weights", size(b.weight_bytes), size(a.weight_bytes), change(a.weight_bytes, b.weight_bytes)],
        ["activations at the peak", *peaks, change(a.peak_activation_bytes, b.peak_activation_bytes) if both else NONE],
    ]
    parts = [table(["", "before", "after", "change"], rows, right=(1, 2, 3), width=width)]
    edits = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in result.plan.counts().items())
    parts.append(wrap(f"plan: {plural(len(result.plan), 'edit')}" + (f" ({edits})" if edits else ""), width))
    if result.proof is not None:
        parts.append(wrap(str(result.proof), width))
    parts += [wrap(f"- {n}", width, indent="  ") for n in shortened(result.notes)]
    return "\n".join(parts)


def channels_table(channel_map: ChannelMap, *, width: int = WIDTH) -> str:
    """A channel map: prunable groups, and the frozen ones by reason."""
    groups = channel_map.groups
    parts = [f"can be pruned: {plural(len(groups), 'group')}, {plural(_channels(groups), 'channel')}"]
    if groups:
        rows = [[g.name, str(len(g.classes)), str(g.width), "; ".join(g.inexact)] for g in groups]
        header = ["group", "channels", "width", "inexact"] if any(g.inexact for g in groups) else ["group", "channels", "width"]
        parts.append(table(header, [r[: len(header)] for r in rows], right=(1, 2), width=width))
    if channel_map.frozen:
        parts.append(reasons([(g.name, g.frozen or "") for g in channel_map.frozen], width=width))
    if channel_map.unvisited:
        names = ", ".join(shortened([f"{k} ({v})" for k, v in channel_map.unvisited.items()], most=3))
        parts.append(wrap(f"never run: {plural(len(channel_map.unvisited), 'module')}: {names}", width))
    return "\n".join(parts)


def benchmark_table(benchmark: Benchmark, *, width: int = WIDTH) -> str:
    """Artefacts side by side: bytes on disk, median latency, its spread, and the ratio to the first."""
    first = benchmark.rows[0]
    rows = []
    for row in benchmark.rows:
        near = NONE if row is first else f"{row.ratio_p10:.2f} to {row.ratio_p90:.2f}"
        low, high = milliseconds(row.p10_ms), milliseconds(row.p90_ms)
        latency = f"{low.split()[0] if low.split()[1] == high.split()[1] else low} to {high}"
        rows.append([row.name, size(row.size_bytes), milliseconds(row.median_ms), latency, f"{row.ratio:.2f} x", near])
    body = table(["artefact", "size", "median", "p10 to p90", "ratio", "p10 to p90"], rows, right=(1, 2, 3, 4, 5), width=width)
    shapes = ", ".join(figures.shape(s) for s in benchmark.inputs)
    said = (
        f"{benchmark.runtime} {benchmark.runtime_version}, {_threads(benchmark.threads)}, input {shapes}, {first.runs} interleaved rounds"
    )
    return "\n".join([body, wrap(said, width), wrap(benchmark.processor, width)])


def evaluation_line(evaluation: Evaluation, *, width: int = WIDTH) -> str:
    """An evaluation in a sentence or two."""
    parts = []
    if evaluation.accuracy is not None:
        low, high = evaluation.accuracy.interval
        parts.append(f"top-1 {percent(evaluation.accuracy.value)} ({percent(low)} to {percent(high)}, n = {evaluation.n})")
    if evaluation.reference_accuracy is not None:
        parts.append(f"the original {percent(evaluation.reference_accuracy.value)}")
    if evaluation.agreement is not None:
        parts.append(f"agreement {percent(evaluation.agreement)}")
    if evaluation.sqnr_db is not None:
        parts.append(f"signal to noise {figures.decibels(evaluation.sqnr_db)}")
    return wrap(", ".join(parts or [f"{evaluation.n} items"]) + f"; {evaluation.runtime}, {_threads(evaluation.threads)}", width)


def sparse_kernels_table(timed: SparseKernels, *, width: int = WIDTH) -> str:
    """Sparse linear layers against dense ones: from which sparsity on they are faster, and by how much at each."""
    parts = []
    for outputs, inputs, batch in dict.fromkeys((r.outputs, r.inputs, r.batch) for r in timed.rows):
        mine = [r for r in timed.rows if (r.outputs, r.inputs, r.batch) == (outputs, inputs, batch)]
        at = timed.break_even(outputs, inputs, batch)
        said = f"faster from {percent(at, places=0)} zeros on" if at is not None else "never faster, of what was measured"
        parts.append(wrap(f"linear {inputs} -> {outputs}, batch {batch}: CSR is {said} ({_threads(timed.threads)}, torch)", width))
        rows = [[percent(r.sparsity, places=0), f"{r.ratio:.2f} x", f"{r.ratio_p10:.2f} to {r.ratio_p90:.2f}"] for r in mine]
        parts.append(table(["zeros", "time, dense = 1", "p10 to p90"], rows, right=(0, 1, 2), width=width))
    return "\n".join(parts)


def run_table(report: Report, *, width: int = WIDTH) -> str:
    """A run: warnings first, then before and after, the budget, agreement, steps, and what was frozen."""
    blocks = [[wrap(f"{report.model}" + (f" on {report.data}" if report.data else ""), width)]]
    blocks[0] += [wrap(f"! {w}", width, indent="  ") for w in report.warnings]
    rows = [list(r) for r in comparison(report.before, report.after)]
    blocks.append([table(["", "before", "after", "change"], rows, right=(1, 2, 3), width=width)])
    latency = report.after.latency_ms
    said = (
        f"latency: {latency.runtime}, {_threads(latency.threads)}, batch {latency.batch}, {latency.runs} interleaved runs"
        if latency
        else ""
    )
    blocks.append([wrap("; ".join(filter(None, (said, agreement(report)))), width)])
    if report.storage:
        blocks[-1].append(wrap(stored(report.storage), width))
    if report.executorch:
        blocks[-1].append(wrap(in_executorch(report.executorch), width))
    if report.budget:
        rows = [[t.name, target_value(t, t.limit), target_value(t, t.reached), "met" if t.met else "MISSED"] for t in report.budget]
        blocks.append([table(["budget", "at most", "reached", ""], rows, right=(1, 2), width=width)])
    if report.steps:
        rows = [[f"{i} {s.step}", amount(s.params), amount(s.macs), f"{s.seconds:.1f} s"] for i, s in enumerate(report.steps, start=1)]
        blocks.append([table(["step", "params after", "MACs after", "took"], rows, right=(1, 2, 3), width=width)])
        blocks[-1] += [wrap(f"{i} {s.step}: {s.proof}", width, indent="  ") for i, s in enumerate(report.steps, start=1) if s.proof]
    if report.frozen:
        blocks.append([reasons([(f.group, f.reason) for f in report.frozen], width=width)])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def comparison(before: Measured, after: Measured) -> list[tuple[str, str, str, str]]:
    """Rows of label, before, after and change for everything that was measured of both."""
    b, a = before, after
    rows = [("size on disk", size(b.size_bytes), size(a.size_bytes), change(a.size_bytes, b.size_bytes))]
    if b.latency_ms and a.latency_ms:
        fast, slow = a.latency_ms, b.latency_ms
        rows.append(("latency, median", milliseconds(slow.median), milliseconds(fast.median), change(fast.median, slow.median)))
        paired = f"{fast.ratio_p10:.2f} to {fast.ratio_p90:.2f} x" if fast.ratio_p10 is not None and fast.ratio_p90 is not None else ""
        rows.append(("  p10 to p90", figures.spread(slow), figures.spread(fast), paired))
    rows += [
        ("MACs", amount(b.macs), amount(a.macs), change(a.macs, b.macs)),
        ("parameters", amount(b.params), amount(a.params), change(a.params, b.params)),
        (
            "activations at the peak",
            size(b.peak_activation_bytes),
            size(a.peak_activation_bytes),
            change(a.peak_activation_bytes, b.peak_activation_bytes),
        ),
    ]
    if a.accuracy:
        moved = figures.points(a.accuracy.value - b.accuracy.value) if b.accuracy else ""
        rows.append(("top-1", figures.top1(b.accuracy), figures.top1(a.accuracy), moved))
        low = [figures.interval(m.accuracy).split(",")[0] for m in (b, a)]
        rows.append(("  95% interval", *low, f"n = {a.accuracy.n}"))  # type: ignore[arg-type]
    return rows


def agreement(report: Report) -> str:
    """How well the exported files agree with their networks and with each other, as a sentence."""
    p = report.parity
    said = []
    if p.top1_agreement is not None:
        said.append(f"top-1 agrees with the original on {percent(p.top1_agreement)} of {p.n} items")
    if p.sqnr_db is not None:
        said.append(f"signal to noise of the logits {figures.decibels(p.sqnr_db)}")
    said.append(f"exported files against torch: original {p.before_difference:.1e}")
    if p.after_difference is not None:
        said[-1] += f", compressed {p.after_difference:.1e} relative"
    elif p.simulation_sqnr_db is not None:
        said[-1] += f" relative, compressed {figures.decibels(p.simulation_sqnr_db)}"
    return "; ".join(said)


def stored(storage: Storage) -> str:
    """The coded weights file in a sentence.

    Examples:
        >>> from gossamer.report.schema import Storage
        >>> stored(Storage(file="a.safetensors", size_bytes=50_000, dense_bytes=1_000_000, entropy_bytes=48_000, zeros=900, weights=1000))
        'weights: a.safetensors 50.0 kB, coded, of 1.00 MB (1/20.0; entropy bound 48.0 kB); 90.0% are zero'
    """
    s = storage
    return (
        f"weights: {s.file} {size(s.size_bytes)}, coded, of {size(s.dense_bytes)} (1/{s.dense_bytes / max(s.size_bytes, 1):.1f}; "
        f"entropy bound {size(s.entropy_bytes)}); {percent(s.zeros / max(s.weights, 1))} are zero"
    )


def in_executorch(e: Executorch) -> str:
    """What the ExecuTorch file takes and how fast it is, in a sentence.

    Examples:
        >>> from gossamer.report.schema import Executorch, Latency
        >>> timed = Latency(median=3.0, p10=2.9, p90=3.2, runtime="executorch 1.5", threads=1, batch=1, runs=50, ratio=1.5)
        >>> in_executorch(Executorch(file="m.pte", before_size_bytes=4_000_000, size_bytes=1_000_000, before_median_ms=2.0, latency_ms=timed))
        'executorch 1.5: m.pte 1.00 MB (the original 4.00 MB), 3.00 ms (the original 2.00 ms, 1.50 x: SLOWER)'
    """
    ratio = e.latency_ms.ratio
    paired = "" if ratio is None else f", {ratio:.2f} x{': SLOWER' if ratio > 1 else ''}"
    said = [
        f"{e.latency_ms.runtime}: {e.file} {size(e.size_bytes)} (the original {size(e.before_size_bytes)})",
        f"{milliseconds(e.latency_ms.median)} (the original {milliseconds(e.before_median_ms)}{paired})",
    ]
    if e.accuracy is not None:
        said.append(f"top-1 {percent(e.accuracy.value)}")
    if e.top1_agreement is not None:
        said.append(f"agrees with the original on {percent(e.top1_agreement)}")
    if e.simulation_sqnr_db is not None:
        said.append(f"{figures.decibels(e.simulation_sqnr_db)} against the simulation")
    return ", ".join(said)


def reasons(frozen: Iterable[tuple[str, str]], *, width: int = WIDTH) -> str:
    """Frozen groups by reason, the most frequent first."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in frozen:
        by_reason.setdefault(reason, []).append(name)
    lines = [f"frozen: {plural(sum(map(len, by_reason.values())), 'group')}"]
    for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        lines.append(wrap(f"{len(names):>4}  {reason or 'no reason given'}: {', '.join(shortened(names, most=3))}", width, indent="      "))
    return "\n".join(lines)


def shortened(lines: Sequence[str], *, most: int = 8) -> list[str]:
    """At most so many lines, the last telling how many more there are.

    Examples:
        >>> shortened(["a", "b", "c", "d"], most=3)
        ['a', 'b', '2 more']
    """
    return list(lines) if len(lines) <= most else [*lines[: most - 1], f"{len(lines) - most + 1} more"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), width: int = WIDTH) -> str:
    """A table of at most ``width`` columns: the first column is cut on its left where it must be, the others last.

    Args:
        header: of each column.
        rows: cells.
        right: columns that are flush right.
        width: characters.
    """
    others = sum(2 + max(len(r[i]) for r in (header, *rows)) for i in range(1, len(header)))
    room = max(12, width - others)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="")
    for i, name in enumerate(header):
        made.add_column(name, justify="right" if i in right else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        made.add_row(tail(row[0], room), *row[1:])
    return _rendered(made, width)


def wrap(text: str, width: int = WIDTH, *, indent: str = "") -> str:
    """A paragraph of at most ``width`` columns; lines after the first are indented."""
    import textwrap

    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False)


def _rendered(what: Table, width: int) -> str:
    out = StringIO()
    Console(
        file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False, markup=False, emoji=False, highlight=False
    ).print(what)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").splitlines())


def _channels(groups: Iterable[ChannelGroup]) -> int:
    return sum(len(g.classes) * g.width for g in groups)


def _threads(n: int) -> str:
    return plural(n, "thread")
