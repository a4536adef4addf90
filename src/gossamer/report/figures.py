"""Figures as people read them, with their units. One MB is 10^6 bytes, as in file managers; one M is 10^6."""

from __future__ import annotations

import math

from gossamer.report.schema import Accuracy, Latency

NONE = "–"
"""What stands where nothing was measured."""


def amount(n: float) -> str:
    """A count with three significant digits and its magnitude.

    Examples:
        >>> amount(300_774_272), amount(6948), amount(52), amount(0)
        ('301 M', '6.95 k', '52', '0')
    """
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size * 0.9995:
            return f"{digits(n / size)} {unit}"
    return f"{n:.0f}"


def size(n: float) -> str:
    """Bytes with three significant digits.

    Examples:
        >>> size(13_960_000), size(3_870_123), size(11_375), size(12)
        ('14.0 MB', '3.87 MB', '11.4 kB', '12 B')
    """
    for one, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(n) >= one * 0.9995:
            return f"{digits(n / one)} {unit}"
    return f"{n:.0f} B"


def milliseconds(ms: float) -> str:
    """A time with three significant digits, in the unit that fits.

    Examples:
        >>> milliseconds(12.345), milliseconds(0.0297), milliseconds(2500)
        ('12.3 ms', '29.7 µs', '2.50 s')
    """
    if ms >= 999.5:
        return f"{digits(ms / 1e3)} s"
    return f"{digits(ms)} ms" if ms >= 0.09995 else f"{digits(ms * 1e3)} µs"


def digits(x: float) -> str:
    """Three significant digits, never an exponent.

    Examples:
        >>> digits(0.5), digits(12.345), digits(1234.5)
        ('0.500', '12.3', '1234')
    """
    if x == 0:
        return "0"
    return f"{x:.{max(0, min(6, 2 - math.floor(math.log10(abs(x)) + 1e-9)))}f}"


def percent(fraction: float, *, places: int = 1) -> str:
    """A fraction of 1 as a percentage.

    Examples:
        >>> percent(0.8025), percent(1.0)
        ('80.2%', '100.0%')
    """
    return f"{fraction * 100:.{places}f}%"


def points(difference: float) -> str:
    """A difference of two fractions in percentage points, with its sign.

    Examples:
        >>> points(-0.015), points(0.0025), points(0.0)
        ('-1.5 points', '+0.25 points', '±0.0 points')
    """
    shown = hundredths(difference * 100)
    if float(shown) == 0:
        return "±0.0 points"
    return f"{shown} points" if difference < 0 else f"+{shown} points"


def hundredths(x: float) -> str:
    """Two decimals, the second only where it is not zero: one item of 400 is a quarter of a point.

    Examples:
        >>> hundredths(80.75), hundredths(80.0)
        ('80.75', '80.0')
    """
    shown = f"{x:.2f}"
    return shown[:-1] if shown.endswith("0") else shown


def ratio(after: float, before: float) -> str:
    """How many times as much.

    Examples:
        >>> ratio(3.87, 13.96), ratio(1, 0)
        ('0.28 x', '–')
    """
    return f"{after / before:.2f} x" if before else NONE


def change(after: float, before: float) -> str:
    """A relative change with its sign.

    Examples:
        >>> change(70, 100), change(100, 100), change(5.2, 4.0)
        ('-30%', 'same', '+30%')
    """
    if after == before:
        return "same"
    if not before:
        return NONE
    relative = (after - before) / before * 100
    return f"{relative:+.0f}%" if abs(relative) >= 9.95 else f"{relative:+.1f}%"


def decibels(db: float | None) -> str:
    """A signal to noise ratio.

    Examples:
        >>> decibels(17.42), decibels(math.inf)
        ('17.4 dB', 'no difference')
    """
    if db is None:
        return NONE
    return f"{db:.1f} dB" if math.isfinite(db) else "no difference" if db > 0 else "no signal"


def spread(latency: Latency | None) -> str:
    """From the 10th to the 90th percentile."""
    return f"{milliseconds(latency.p10)} to {milliseconds(latency.p90)}" if latency else NONE


def top1(accuracy: Accuracy | None) -> str:
    """Accuracy as a percentage."""
    return f"{hundredths(accuracy.value * 100)}%" if accuracy else NONE


def interval(accuracy: Accuracy | None) -> str:
    """The 95% interval of an accuracy, with the number of items.

    Examples:
        >>> interval(Accuracy(value=0.8, n=400, interval=(0.758, 0.836)))
        '75.8% to 83.6%, n = 400'
    """
    return f"{percent(accuracy.interval[0])} to {percent(accuracy.interval[1])}, n = {accuracy.n}" if accuracy else NONE


def shape(dims: tuple[int, ...] | list[int]) -> str:
    """A shape.

    Examples:
        >>> shape((1, 32, 112, 112))
        '1x32x112x112'
    """
    return "x".join(map(str, dims)) or "scalar"


def plural(n: int, noun: str) -> str:
    """A number with its noun.

    Examples:
        >>> plural(1, "thread"), plural(2, "thread")
        ('1 thread', '2 threads')
    """
    return f"{n} {noun}{'s' * (n != 1)}"


def tail(text: str, width: int) -> str:
    """The end of a long name: in a module path the end tells more.

    Examples:
        >>> tail("features.17.conv.2", 10), tail("conv", 10)
        ('…17.conv.2', 'conv')
    """
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]
