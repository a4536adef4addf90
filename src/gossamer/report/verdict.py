"""The headline: what came of it, in one line, and whether that is good."""

from __future__ import annotations

from typing import Literal

from gossamer.report import figures
from gossamer.report.schema import Report

Tone = Literal["good", "mixed", "bad"]


def verdict(report: Report) -> str:
    """Size, speed and accuracy against the original; what got worse comes first.

    Args:
        report: of a run.

    Returns:
        For example ``"3.61 x smaller, 1.57 x faster, -0.5 points top-1"``.
    """
    worse: list[str] = []
    better: list[str] = []
    b, a = report.before, report.after
    if b.latency_ms and a.latency_ms:
        said = times(b.latency_ms.median, a.latency_ms.median, "faster", "slower", "as fast")
        (worse if a.latency_ms.median > b.latency_ms.median else better).append(said)
    said = times(b.size_bytes, a.size_bytes, "smaller", "larger", "as large")
    (worse if a.size_bytes > b.size_bytes else better).insert(0, said)
    if a.accuracy and b.accuracy:
        better.append(f"{figures.points(a.accuracy.value - b.accuracy.value)} top-1")
    elif a.accuracy:
        better.append(f"{figures.top1(a.accuracy)} top-1")
    return ", ".join(reversed(worse)) + ("; " if worse else "") + ", ".join(better)


def tone(report: Report) -> Tone:
    """``"bad"``: slower, larger, or the budget is missed; ``"mixed"``: there are warnings; ``"good"``: there are none."""
    b, a = report.before, report.after
    slower = bool(b.latency_ms and a.latency_ms and a.latency_ms.median > b.latency_ms.median)
    if slower or a.size_bytes > b.size_bytes or any(not t.met for t in report.budget):
        return "bad"
    return "mixed" if report.warnings else "good"


def times(before: float, after: float, less: str, more: str, same: str) -> str:
    """How many times less or more of something.

    Examples:
        >>> times(10, 5, "smaller", "larger", "as large"), times(5, 10, "smaller", "larger", "as large")
        ('2.00 x smaller', '2.00 x larger')
    """
    if after == before or not after or not before:
        return same
    return f"{figures.digits(before / after)} x {less}" if after < before else f"{figures.digits(after / before)} x {more}"
