"""A plan as plain data, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gossamer.memory.liveness import Life, profile
from gossamer.memory.program import View
from gossamer.report.figures import size
from gossamer.report.text import table

if TYPE_CHECKING:
    from gossamer.memory.plan import MemoryPlan

LISTED = 12
"""Stretches of memory that the table lists: the largest at the worst moment."""


def as_json(plan: MemoryPlan) -> dict[str, Any]:
    """See `MemoryPlan.to_json`."""
    patching = plan.patching
    return {
        "arena_bytes": plan.arena_bytes,
        "lower_bound_bytes": plan.lower_bound_bytes,
        "any_order_bound_bytes": plan.any_order_bound_bytes,
        "given_order_bytes": plan.given_order_bytes,
        "no_reuse_bytes": plan.no_reuse_bytes,
        "input_bytes": plan.input_bytes,
        "outside_bytes": plan.outside_bytes,
        "optimal": plan.optimal,
        "method": plan.method,
        "alignment": plan.alignment,
        "steps": [
            {
                "name": s.name,
                "kernel": s.kernel,
                "reads": [_view(r, plan) for r in s.reads if r is not None],
                "writes": [_view(w, plan) for w in s.writes],
                "scratch_bytes": s.scratch,
                "outside_bytes": s.outside,
            }
            for s in plan.program.steps
        ],
        "tensors": [
            {
                "name": life.name,
                "buffers": list(life.buffers),
                "offset": at,
                "bytes": life.size,
                "first_step": life.first,
                "last_step": life.last,
            }
            for life, at in zip(plan.lives, plan.offsets, strict=True)
        ],
        "inputs": [None if v is None else _view(v, plan) for v in plan.program.inputs],
        "outputs": [_view(v, plan) for v in plan.program.outputs if isinstance(v, View)],
        "patches": None
        if patching is None
        else {
            "grid": list(patching.grid),
            "steps": patching.steps,
            "until": patching.until,
            "macs": patching.macs,
            "recomputed_macs": patching.recomputed_macs,
            "without_bytes": patching.without_bytes,
        },
        "notes": list(plan.notes),
    }


def _view(value: Any, plan: MemoryPlan) -> dict[str, Any]:
    """A view, or a constant, as plain data."""
    if isinstance(value, Tensor):
        return {"constant": True, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    assert isinstance(value, View)
    dtype = str(value.dtype).removeprefix("torch.")
    return {"buffer": value.buffer, "shape": list(value.shape), "stride": list(value.stride), "offset": value.offset, "dtype": dtype}


def as_table(plan: MemoryPlan) -> str:
    """See `MemoryPlan.__str__`."""
    steps = len(plan.program.steps)
    at = worst_moment(plan)
    here = [(life, o) for life, o in zip(plan.lives, plan.offsets, strict=True) if life.first <= at <= life.last]
    where = plan.program.steps[at].name if 0 <= at < steps else "the input" if at < 0 else "the output"
    why = "no arena can be smaller in this order" if plan.optimal else "the bound was not reached"
    lines = [
        f"{size(plan.arena_bytes)} of memory in one arena, {size(plan.no_reuse_bytes)} without reuse; inputs take {size(plan.input_bytes)} of it.",
        f"Live at the worst moment {size(plan.lower_bound_bytes)}: {why}; no order of the {steps} steps is below {size(plan.any_order_bound_bytes)}.",
    ]
    if plan.lower_bound_bytes < plan.given_order_bytes and plan.patching is None:
        lines.append(f"Reordered: {size(plan.given_order_bytes)} in the network's own order.")
    if plan.patching is not None:
        p = plan.patching
        lines.append(
            f"The first {p.steps} steps, to {p.until}, in {p.grid[0]} x {p.grid[1]} patches: {p.recomputed:.1%} more multiply-adds, "
            f"{size(p.without_bytes)} without."
        )
    if plan.outside:
        names = ", ".join(list(plan.outside)[:3]) + (f" and {len(plan.outside) - 3} more" if len(plan.outside) > 3 else "")
        lines.append(
            f"Beside the arena, up to {size(plan.outside_bytes)} while {names} run: torch has no kernel for them that writes into it."
        )
    lines += list(plan.notes)
    rows = [
        [_label(life, plan), size(life.size), f"{o:,}", f"{max(0, life.first)} to {min(life.last, steps - 1)}"]
        for life, o in sorted(here, key=lambda p: -p[0].size)[:LISTED]
    ]
    lines += ["", table([f"at the worst moment, {where}", "size", "address", "steps"], rows, right=(1, 2, 3))]
    return "\n".join(lines)


def worst_moment(plan: MemoryPlan) -> int:
    """The step with the most live bytes."""
    live = profile(plan.lives, len(plan.program.steps))
    return live.index(max(live)) - 1


def _label(life: Life, plan: MemoryPlan) -> str:
    """Names of the steps that write a stretch of memory."""
    if life.scratch is not None:
        return life.name
    names = _writers(plan)
    found = list(dict.fromkeys(names[b] for b in life.buffers if b in names))
    return found[0] + (f" ... {found[-1]}" if len(found) > 1 else "") if found else life.name


def _writers(plan: MemoryPlan) -> Mapping[int, str]:
    """The step that first writes each buffer, by name; inputs are ``"input"``."""
    named = {v.buffer: "input" for v in plan.program.inputs if v is not None}
    for step in plan.program.steps:
        for w in step.writes:
            named.setdefault(w.buffer, step.name)
    return named


def draw(plan: MemoryPlan, path: Path) -> Path:
    """See `MemoryPlan.picture`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from gossamer.errors import UsageError

    if path.suffix.lower() not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise UsageError(f"{path}: name a .png, .svg or .pdf file in a folder that exists")
    steps, unit = len(plan.program.steps), 1e6 if plan.arena_bytes >= 1e6 else 1e3
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {"input": "#E8A33D", "scratch": "#B0B7C3", "tensor": "#3B7EA1", "other": "#7FB2C9"}
    biggest = max((life.size for life in plan.lives), default=1)
    for i, (life, at) in enumerate(zip(plan.lives, plan.offsets, strict=True)):
        left, right = max(-1, life.first) - 0.5, min(steps, life.last) + 0.5
        kind = "scratch" if life.scratch is not None else "input" if life.first < 0 else ("tensor", "other")[i % 2]
        axes.add_patch(
            Rectangle((left, at / unit), right - left, life.size / unit, facecolor=colours[kind], edgecolor="white", linewidth=0.6)
        )
        wide, high = (right - left) / (steps + 2), life.size / max(1, plan.arena_bytes)
        if life.size > 0.08 * biggest and wide > 0.05 and high > 0.045:
            label = _label(life, plan).split(" ... ")[0]
            room = int(wide * 150)
            text = label if len(label) <= room else "…" + label[-max(1, room - 1) :]
            axes.text(
                (left + right) / 2, (at + life.size / 2) / unit, text, ha="center", va="center", fontsize=7, color="white", clip_on=True
            )
    live = profile(plan.lives, steps)
    xs = [x - 0.5 for x in range(-1, steps + 2)]
    axes.stairs([v / unit for v in live], xs, color="#1B1F23", linewidth=1.0, label="live bytes")
    axes.axhline(plan.arena_bytes / unit, color="#C2410C", linewidth=1.0, linestyle="--", label=f"arena, {size(plan.arena_bytes)}")
    axes.set(xlim=(-1.5, steps + 0.5), ylim=(0, 1.08 * max(1, plan.arena_bytes) / unit))
    axes.set_xlabel("step")
    axes.set_ylabel(f"address, {'MB' if unit == 1e6 else 'kB'}")
    title = f"{size(plan.arena_bytes)} in one arena, {size(plan.no_reuse_bytes)} without reuse"
    if plan.patching is not None:
        title += f"; first stage in {plan.patching.grid[0]} x {plan.patching.grid[1]} patches"
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, facecolor=colours[k]) for k in ("tensor", "input", "scratch")]
    lines, names = axes.get_legend_handles_labels()
    axes.legend([*handles, *lines], ["tensor", "input", "scratch", *names], loc="upper right", fontsize=8, frameon=False, ncols=5)
    figure.savefig(path, dpi=160)
    return path
