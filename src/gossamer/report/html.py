"""report.html: one file that needs nothing else, no script and no network, for screens of any width and for paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jinja2
import yaml

from gossamer.report import figures
from gossamer.report.schema import Accuracy, Latency, Measured, Report
from gossamer.report.verdict import times, tone, verdict
from gossamer.report.warnings import target_value


@dataclass(frozen=True)
class Mark:
    """One line of a card's picture, in percent of its width: a bar from 0 to ``at``, or a dot at ``at`` with whiskers."""

    label: str
    text: str
    at: float
    low: float | None = None
    high: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Card:
    """One figure before and after: the new value, the change in words, and a picture of both."""

    title: str
    value: str
    change: str
    tone: str
    marks: tuple[Mark, ...]
    note: str = ""


def html_report(report: Report) -> str:
    """A report as one self-contained HTML page.

    Args:
        report: of a run.

    Returns:
        HTML; every text is escaped, and nothing is loaded from elsewhere.
    """
    by_reason: dict[str, list[str]] = {}
    for f in report.frozen:
        by_reason.setdefault(f.reason or "no reason given", []).append(f.group)
    most = max((max(row.macs_before, row.macs_after) for row in report.layers), default=0) or 1
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            verdict=verdict(report),
            created=report.created.replace("T", " ").replace("+00:00", " UTC"),
            tone=tone(report),
            cards=[*cards(report.before, report.after), *_stored(report), *_executorch(report)],
            frozen=sorted(by_reason.items(), key=lambda item: -len(item[1])),
            recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True) if report.recipe else "",
            machine=flat(report.environment),
            target_value=target_value,
            share=lambda macs: round(100 * macs / most, 2),
        )
    )


def _stored(report: Report) -> list[Card]:
    if report.storage is None:
        return []
    s = report.storage
    card = _bar(
        "Weights file, coded", s.dense_bytes, s.size_bytes, figures.size, times(s.dense_bytes, s.size_bytes, "smaller", "larger", "same")
    )
    return [replace(card, note=f"entropy bound {figures.size(s.entropy_bytes)}; {figures.percent(s.zeros / max(s.weights, 1))} are zero")]


def _executorch(report: Report) -> list[Card]:
    e = report.executorch
    if e is None:
        return []
    said = times(e.before_median_ms, e.latency_ms.median, "faster", "slower", "same")
    card = _bar("Latency in ExecuTorch", e.before_median_ms, e.latency_ms.median, figures.milliseconds, said)
    return [replace(card, note=f"{e.file} {figures.size(e.size_bytes)}, the original {figures.size(e.before_size_bytes)}")]


@cache
def environment() -> jinja2.Environment:
    """The templates, with the figures' functions as filters; everything is escaped in HTML, nothing in Markdown."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("gossamer.report"),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (
        "amount",
        "size",
        "milliseconds",
        "percent",
        "points",
        "ratio",
        "change",
        "decibels",
        "spread",
        "top1",
        "interval",
        "shape",
        "plural",
    )
    made.filters.update({name: getattr(figures, name) for name in filters})
    return made


def cards(before: Measured, after: Measured) -> list[Card]:
    """A card for each figure, the ones that ship first."""
    out = [
        _bar(
            "Size on disk",
            before.size_bytes,
            after.size_bytes,
            figures.size,
            times(before.size_bytes, after.size_bytes, "smaller", "larger", "same"),
        )
    ]
    if before.latency_ms and after.latency_ms:
        out.append(_latency(before.latency_ms, after.latency_ms))
    if after.accuracy:
        out.append(_accuracy(before.accuracy, after.accuracy))
    for title, b, a, unit in (
        ("Multiply-adds", before.macs, after.macs, figures.amount),
        ("Parameters", before.params, after.params, figures.amount),
        ("Activations at the peak", before.peak_activation_bytes, after.peak_activation_bytes, figures.size),
    ):
        out.append(_bar(title, b, a, unit, _percent_less(b, a, "fewer" if unit is figures.amount else "less")))
    return out


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested data as rows of name and value.

    Examples:
        >>> flat({"cores": 2, "versions": {"torch": "2.14"}})
        [('cores', '2'), ('versions / torch', '2.14')]
    """
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name} / ")
        elif value is not None:
            rows.append((f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return rows


def _bar(title: str, before: float, after: float, unit: Callable[[float], str], change: str) -> Card:
    most = max(before, after) or 1
    marks = (Mark("original", unit(before), 100 * before / most), Mark("compressed", unit(after), 100 * after / most))
    return Card(title, unit(after), change, _tone(before, after), marks)


def _latency(before: Latency, after: Latency) -> Card:
    most = max(before.p90, after.p90, before.median, after.median) * 1.02 or 1
    marks = tuple(
        Mark(label, figures.milliseconds(m.median), 100 * m.median / most, 100 * m.p10 / most, 100 * m.p90 / most, figures.spread(m))
        for label, m in (("original", before), ("compressed", after))
    )
    where = f"{after.runtime}, {figures.plural(after.threads, 'thread')}, batch {after.batch}"
    note = f"median, and 10th to 90th percentile of {after.runs} interleaved runs; {where}"
    if after.ratio is not None and after.ratio_p10 is not None and after.ratio_p90 is not None:
        note += f"; paired ratio {after.ratio:.2f} ({after.ratio_p10:.2f} to {after.ratio_p90:.2f})"
    change = times(before.median, after.median, "faster", "slower", "same")
    return Card("Latency", figures.milliseconds(after.median), change, _tone(before.median, after.median), marks, note)


def _accuracy(before: Accuracy | None, after: Accuracy) -> Card:
    shown = [(label, a) for label, a in (("original", before), ("compressed", after)) if a is not None]
    low, high = min(a.interval[0] for _, a in shown), max(a.interval[1] for _, a in shown)
    pad = max((high - low) * 0.08, 0.002)
    low, high = max(0.0, low - pad), min(1.0, high + pad)

    def at(value: float) -> float:
        return 100 * (value - low) / (high - low)

    marks = tuple(
        Mark(label, figures.top1(a), at(a.value), at(a.interval[0]), at(a.interval[1]), figures.interval(a).split(",")[0])
        for label, a in shown
    )
    drop = after.value - before.value if before else 0.0
    change = figures.points(drop) if before else ""
    note = f"with 95% intervals, n = {after.n}; the picture spans {figures.percent(low)} to {figures.percent(high)}"
    return Card(
        "Top-1 accuracy", figures.top1(after), change, "bad" if drop < -0.01 - 1e-9 else "good" if drop > 0 else "same", marks, note
    )


def _percent_less(before: float, after: float, less: str) -> str:
    return f"{figures.change(after, before).lstrip('-+')} {'' if after == before else less if after < before else 'more'}".rstrip()


def _tone(before: float, after: float) -> str:
    return "good" if after < before else "bad" if after > before else "same"
