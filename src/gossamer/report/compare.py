"""Several runs, or several networks and files, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gossamer.errors import UsageError
from gossamer.report import figures
from gossamer.report.figures import NONE, amount, milliseconds, size
from gossamer.report.schema import Report
from gossamer.report.text import WIDTH, benchmark_table, table, wrap

if TYPE_CHECKING:
    from gossamer.profiling import SideBySide


def compare_table(reports: Mapping[str, Report], *, width: int = WIDTH) -> str:
    """Runs as rows: bytes on disk, latency, multiply-adds and accuracy, each also as a multiple of the run's own original.

    Args:
        reports: by name.
        width: characters.

    Returns:
        A table, and below it what keeps the rows from being compared: another original, other data, another machine.

    Raises:
        UsageError: there is nothing to compare.
    """
    if not reports:
        raise UsageError("no reports to compare: name one or more run folders")
    rows = []
    for name, r in reports.items():
        b, a = r.before, r.after
        latency, times = NONE, NONE
        if a.latency_ms:
            latency = milliseconds(a.latency_ms.median)
            times = figures.ratio(a.latency_ms.median, b.latency_ms.median) if b.latency_ms else NONE
        moved = figures.points(a.accuracy.value - b.accuracy.value).removesuffix(" points") if a.accuracy and b.accuracy else NONE
        cells = [
            size(a.size_bytes),
            figures.ratio(a.size_bytes, b.size_bytes),
            latency,
            times,
            amount(a.macs),
            figures.ratio(a.macs, b.macs),
        ]
        rows.append([name, *cells, figures.top1(a.accuracy), moved])
    header = ["run", "size", "", "latency", "", "MACs", "", "top-1", "points"]
    parts = [table(header, rows, right=range(1, 9), width=width), "x: of the run's own original"]
    parts += [wrap(line, width, indent="  ") for line in differences(reports)]
    for name, r in reports.items():
        parts += [wrap(f"! {name}: {w}", width, indent="  ") for w in r.warnings[:1]]
    return "\n".join(parts)


def side_by_side_table(sides: SideBySide, *, width: int = WIDTH) -> str:
    """Artefacts side by side: parameters, MACs, activations, accuracy where it was measured; then the benchmark's own table."""
    header, right = ["artefact", "params", "MACs", "activations"], [1, 2, 3]
    labelled = any(row.accuracy for row in sides.rows)
    if labelled:
        header, right = [*header, "top-1", "95% interval"], [*right, 4, 5]
    rows = []
    for row in sides.rows:
        cells = [
            NONE if n is None else shown(n) for n, shown in ((row.params, amount), (row.macs, amount), (row.peak_activation_bytes, size))
        ]
        if labelled and row.accuracy is not None:
            low, high = row.accuracy.interval
            cells += [f"{figures.hundredths(row.accuracy.value * 100)}%", f"{figures.percent(low)} to {figures.percent(high)}"]
        rows.append([row.timing.name, *cells, *[NONE] * (len(header) - 1 - len(cells))])
    parts = [table(header, rows, right=right, width=width)]
    if labelled:
        parts.append(f"top-1 on {next(row.accuracy.n for row in sides.rows if row.accuracy)} items")
    parts += [wrap(f"- {n}", width, indent="  ") for n in sides.notes]
    return "\n".join(parts) + "\n\n" + benchmark_table(sides.benchmark, width=width)


def differences(reports: Mapping[str, Report]) -> list[str]:
    """What differs between runs, so that their figures cannot be held against each other; one line for each thing."""
    found = []
    for what, read in (
        ("originals", lambda r: r.model),
        ("data", lambda r: r.data or "none"),
        ("processors", lambda r: str(r.environment.get("processor", "not recorded"))),
        ("threads", lambda r: str(r.after.latency_ms.threads) if r.after.latency_ms else "not timed"),
        ("runtimes", lambda r: r.after.latency_ms.runtime if r.after.latency_ms else "not timed"),
    ):
        values = {name: read(r) for name, r in reports.items()}
        if len(set(values.values())) > 1:
            found.append(f"! different {what}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    return found
