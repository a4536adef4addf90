"""Artefacts side by side as one picture: accuracy or parameters against latency, bubbles as large as the files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.errors import NothingToDo, UsageError, near
from gossamer.report import figures
from gossamer.report.figures import plural

if TYPE_CHECKING:
    from gossamer.profiling import Side, SideBySide

FORMATS = (".png", ".svg", ".pdf")
"""Endings of pictures that can be written."""

INK, QUIET, GRID, UNKNOWN = "#1f2933", "#66727f", "#e4e8ec", "#b8c0c8"
Box = tuple[float, float, float, float]
LARGEST_POINTS = 58.0
"""Diameter of the largest bubble; areas are proportional to bytes."""

SMALLEST_POINTS = 7.0
"""Diameter below which a bubble could not be seen."""


def check_file(path: Path) -> None:
    """UsageError where no picture can be written to ``path``: asked before anything is measured."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--picture {path}: the name must end in {', '.join(FORMATS)}{near(path.suffix, FORMATS)}")
    if not path.parent.is_dir():
        raise UsageError(f"--picture {path}: there is no folder {path.parent}")


def draw(sides: SideBySide, path: Path) -> None:
    """Draw artefacts as bubbles.

    Left to right is the median latency, with whiskers from the 10th to the 90th percentile. Upwards is top-1 accuracy with its 95% interval where
    at least two artefacts have one, and parameters otherwise. The area of a bubble is its file's size, the colour its multiply-adds (grey where
    they are not known).

    Args:
        sides: what was compared.
        path: the file to write, in the format of its ending.

    Raises:
        UsageError: another ending, or a folder that does not exist.
        NothingToDo: no artefact has accuracy or parameters.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_file(path)
    labelled = sum(row.accuracy is not None for row in sides.rows) > 1
    rows = [r for r in sides.rows if (r.accuracy if labelled else r.params) is not None]
    if not rows:
        raise NothingToDo(f"--picture {path}: no artefact has a known accuracy or number of parameters to draw it by")
    figure = Figure(figsize=(10, 6.2), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.08, 0.115, 0.75, 0.755))
    _scales(axes, rows, labelled)
    colour = _colours(figure, rows)
    biggest = max(r.timing.size_bytes for r in rows)
    for row in sorted(rows, key=lambda r: -r.timing.size_bytes):
        x, y, fill = row.timing.median_ms, _height(row, labelled), colour(row.macs)
        axes.plot([row.timing.p10_ms, row.timing.p90_ms], [y, y], color=fill, lw=1.4, alpha=0.9, zorder=2, solid_capstyle="round")
        if labelled and row.accuracy is not None:
            axes.plot([x, x], [100 * a for a in row.accuracy.interval], color=fill, lw=1.4, alpha=0.9, zorder=2, solid_capstyle="round")
        area = _diameter(row.timing.size_bytes, biggest) ** 2
        axes.scatter([x], [y], s=area, color=fill, edgecolors="white", linewidths=1.2, zorder=3)
    if labelled:
        _front(axes, rows)
    _names(figure, axes, rows, labelled, biggest)
    _sizes(figure, biggest)
    _words(figure, sides, labelled)
    figure.savefig(path, facecolor="white")


def short_names(names: Sequence[str]) -> list[str]:
    """Names without their scheme or folders, where they are then still different.

    Examples:
        >>> short_names(["gossamer:resnet18", "torchvision:vgg11", "runs/a/model.onnx", "runs/b/model.onnx"])
        ['resnet18', 'vgg11', 'runs/a/model.onnx', 'runs/b/model.onnx']
    """
    short = [n.rpartition(":")[2] if ":" in n else Path(n).name for n in names]
    return [s if short.count(s) == 1 else n for s, n in zip(short, names, strict=True)]


def _height(row: Side, labelled: bool) -> float:
    if labelled:
        assert row.accuracy is not None
        return 100 * row.accuracy.value
    assert row.params is not None
    return float(row.params)


def _diameter(size_bytes: int, biggest: int) -> float:
    return max(SMALLEST_POINTS, LARGEST_POINTS * math.sqrt(size_bytes / max(biggest, 1)))


def _scales(axes: Any, rows: Sequence[Side], labelled: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def logarithmic(axis: Any, values: Sequence[float], limits: Any, shown: Any) -> None:
        low, high = min(values), max(values)
        room = max(1.35, (high / low) ** 0.13)
        limits(low / room, high * room**1.5)
        wide = high / low > 300
        axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda v, _: shown(v)))
        axis.set_minor_formatter(NullFormatter())

    axes.set_xscale("log")
    ends = [v for r in rows for v in (r.timing.p10_ms, r.timing.p90_ms)]
    logarithmic(axes.xaxis, [max(v, 1e-6) for v in ends], axes.set_xlim, lambda v: f"{v:g} ms" if v >= 0.1 else f"{v * 1e3:g} µs")
    if labelled:
        ends = [100 * v for r in rows if r.accuracy for v in r.accuracy.interval]
        room = max(2.0, 0.12 * (max(ends) - min(ends)))
        axes.set_ylim(min(ends) - room, max(ends) + room)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}%" if 0 <= v <= 100 else ""))
    else:
        axes.set_yscale("log")
        logarithmic(axes.yaxis, [max(float(r.params or 0), 1.0) for r in rows], axes.set_ylim, lambda v: _round(v))
    axes.tick_params(which="both", length=0, colors=QUIET, labelsize=10, pad=6)
    axes.minorticks_off()
    axes.grid(color=GRID, lw=0.9, zorder=0)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(UNKNOWN)


def _round(v: float) -> str:
    for one, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if v >= one:
            return f"{v / one:g}{unit}"
    return f"{v:g}"


def _colours(figure: Any, rows: Sequence[Side]) -> Any:
    """From MACs to a colour, with a bar that explains it; grey where there are none."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    known = [r.macs for r in rows if r.macs]
    if not known:
        return lambda macs: UNKNOWN
    ramp = LinearSegmentedColormap.from_list("macs", ["#3fb8af", "#2f8fc0", "#3f5fb0", "#5b3a91", "#8a2a6b"])
    low, high = min(known), max(known)
    mapped = ScalarMappable(LogNorm(low, high if high > low else low * 1.01), ramp)
    if high > low:
        place = figure.add_axes((0.875, 0.115, 0.014, 0.36))
        bar = figure.colorbar(mapped, cax=place)
        bar.outline.set_visible(False)
        place.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        place.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _round(v)))
        place.yaxis.set_minor_formatter(NullFormatter())
        place.tick_params(which="both", length=0, colors=QUIET, labelsize=9)
        figure.text(0.875, 0.49, "MACs", color=QUIET, fontsize=10, va="bottom")
    return lambda macs: mapped.to_rgba(macs) if macs else UNKNOWN


def _front(axes: Any, rows: Sequence[Side]) -> None:
    """A line through those that none is both faster and more accurate than."""
    best, line = -1.0, []
    for row in sorted(rows, key=lambda r: (r.timing.median_ms, -_height(r, True))):
        if _height(row, True) > best:
            best = _height(row, True)
            line.append((row.timing.median_ms, best))
    if len(line) > 1:
        axes.plot(*zip(*line, strict=True), color=QUIET, lw=1.2, ls=(0, (4, 3)), alpha=0.8, zorder=1)


def _names(figure: Any, axes: Any, rows: Sequence[Side], labelled: bool, biggest: int) -> None:
    """A name beside each bubble, where it covers the fewest others."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white", alpha=0.85)]
    renderer = figure.canvas.get_renderer()
    pixels = figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    centres = [axes.transData.transform((r.timing.median_ms, _height(r, labelled))) for r in rows]
    radii = [_diameter(r.timing.size_bytes, biggest) / 2 * pixels for r in rows]
    taken = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(centres, radii, strict=True)]
    taken = [(a - 5 * pixels, b - 2 * pixels, c + 5 * pixels, d + 2 * pixels) for a, b, c, d in taken]
    taken += [box for r in rows for box in _whiskers(axes, r, labelled, pixels)]
    names = short_names([r.timing.name for r in rows])
    for i in sorted(range(len(rows)), key=lambda i: (-centres[i][1], centres[i][0])):
        (x, y), gap = centres[i], radii[i] + 5 * pixels
        label = axes.text(0, 0, names[i], fontsize=10.5, color=INK, va="center", ha="left", zorder=5, path_effects=halo)
        box = label.get_window_extent(renderer)
        w, h = box.width, box.height
        spots = []
        for step in (0.0, 0.8, 1.8, 3.0):
            far = gap + step * h
            slant = far * 0.72
            spots += [(x + far, y - h / 2), (x - w / 2, y + far), (x - w / 2, y - far - h), (x - far - w, y - h / 2)]
            spots += [(x + slant, y + slant), (x + slant, y - slant - h), (x - slant - w, y + slant), (x - slant - w, y - slant - h)]
        cost = [
            _covered((a, b, a + w, b + h), taken, i) + _outside((a, b, a + w, b + h), frame) + (k % 8 * 0.004 + k // 8 * 0.12) * w * h
            for k, (a, b) in enumerate(spots)
        ]
        a, b = spots[min(range(len(spots)), key=cost.__getitem__)]
        taken.append((a, b, a + w, b + h))
        label.set_position(axes.transData.inverted().transform((a, b + h / 2)))


def _whiskers(axes: Any, row: Side, labelled: bool, pixels: float) -> list[Box]:
    (left, y), (right, _) = (axes.transData.transform((ms, _height(row, labelled))) for ms in (row.timing.p10_ms, row.timing.p90_ms))
    found = [(left, y - pixels, right, y + pixels)]
    if labelled and row.accuracy is not None:
        (x, low), (_, high) = (axes.transData.transform((row.timing.median_ms, 100 * a)) for a in row.accuracy.interval)
        found.append((x - pixels, low, x + pixels, high))
    return found


def _covered(box: Box, taken: Sequence[Box], own: int) -> float:
    """Area in pixels that a box has in common with others."""
    total = 0.0
    for i, other in enumerate(taken):
        w = min(box[2], other[2]) - max(box[0], other[0])
        h = min(box[3], other[3]) - max(box[1], other[1])
        if w > 0 and h > 0 and i != own:
            total += w * h
    return total


def _outside(box: Box, frame: Any) -> float:
    """Area in pixels that is outside the frame, heavily weighted."""
    w = max(0.0, min(box[2], frame.x1) - max(box[0], frame.x0))
    h = max(0.0, min(box[3], frame.y1) - max(box[1], frame.y0))
    return 10 * ((box[2] - box[0]) * (box[3] - box[1]) - w * h)


def _sizes(figure: Any, biggest: int) -> None:
    """Bubbles one in another that say what an area means."""
    place = figure.add_axes((0.857, 0.56, 0.143, 0.31))
    place.set_axis_off()
    wide, high = figure.get_figwidth() * 72 * 0.143, figure.get_figheight() * 72 * 0.31
    place.set_xlim(0, wide)
    place.set_ylim(0, high)
    middle, bottom = 2 + LARGEST_POINTS / 2, high - LARGEST_POINTS - 26
    place.text(10.8, high - 4, "file", color=QUIET, fontsize=10, va="top")
    above = math.inf
    for size_bytes in dict.fromkeys(_tidy(biggest * f) for f in (1.0, 0.3, 0.06)):
        across = _diameter(size_bytes, biggest)
        place.scatter([middle], [bottom + across / 2], s=across**2, facecolors="none", edgecolors=UNKNOWN, linewidths=1.3)
        above = min(bottom + across, above - 13)
        shown = figures.size(size_bytes).replace(".00 ", " ").replace(".0 ", " ")
        place.text(middle + LARGEST_POINTS / 2 + 4, above, shown, color=QUIET, fontsize=9, va="center")


def _tidy(size_bytes: float) -> int:
    """The nearest 1, 2 or 5 times a power of ten, not above."""
    power = 10 ** math.floor(math.log10(max(size_bytes, 1)))
    return int(next(m * power for m in (5, 2, 1) if m * power <= max(size_bytes, 1)))


def _words(figure: Any, sides: SideBySide, labelled: bool) -> None:
    timed = sides.benchmark
    what = "Accuracy against latency" if labelled else "Parameters against latency"
    figure.text(0.08, 0.945, what, color=INK, fontsize=16, fontweight="bold", va="center")
    shapes = ", ".join(figures.shape(s) for s in timed.inputs)
    ran = f"{timed.runtime} {timed.runtime_version}, {plural(timed.threads, 'thread')}, input {shapes}, {timed.rows[0].runs} interleaved rounds"
    figure.text(0.08, 0.9, f"{ran}  ·  {timed.processor}", color=QUIET, fontsize=9.5, va="center")
    upwards = "top-1 accuracy, 95% interval" if labelled else "parameters"
    figure.text(0.08, 0.03, f"latency, median, 10th to 90th percentile  →       ↑  {upwards}", color=QUIET, fontsize=9.5, va="center")
