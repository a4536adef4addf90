"""A plan as a table."""

from __future__ import annotations

from gossamer.parallel.planning.plan import ParallelPlan, Split
from gossamer.report.figures import milliseconds, percent, size
from gossamer.report.text import table, wrap

ROWS = 16
"""Splits that a table lists."""


def degrees(split: Split) -> str:
    """As ``--parallel`` takes it: ``"ddp,8+pp,4"``."""
    parallel = split.parallel
    kinds = {"fsdp" if parallel.shard else "ddp": parallel.data, "tp": parallel.tensor, "pp": parallel.pipeline}
    return "+".join(f"{kind},{n}" for kind, n in kinds.items() if n > 1) or "one process"


def plan_table(plan: ParallelPlan, *, width: int = 80) -> str:
    """The fastest splits first; below it what was assumed, and why others are missing."""
    rows = []
    for split in plan.splits[:ROWS]:
        sent = sum(split.sent_bytes.values())
        bubble = percent(split.bubble) if split.parallel.pipeline > 1 else "-"
        memory = size(split.memory.total) + ("" if split.fits else " !")
        rows.append([degrees(split), memory, size(sent), milliseconds(1e3 * split.seconds), percent(split.efficiency), bubble])
    best = plan.best
    machine = plan.machine
    said = [
        f"{plan.world} processes, {plan.batch_size} samples a step, {plan.optimizer}: "
        + (f"fastest that fits is {degrees(best)}" if best is not None else "none of the splits fits the memory (!)")
    ]
    parts = [
        wrap(" ".join(said), width),
        table(["split", "memory", "sent", "step", "efficiency", "bubble"], rows, right=(1, 2, 3, 4, 5), width=width),
    ]
    if len(plan.splits) > ROWS:
        parts.append(f"and {len(plan.splits) - ROWS} slower ones")
    limit = f"{size(machine.memory_bytes)} of memory, " if machine.memory_bytes is not None else ""
    parts.append(
        wrap(
            f"Predicted, for processes with {limit}{machine.flops:.3g} flop/s, {size(machine.memory_bandwidth)}/s to memory, "
            f"{1e6 * machine.launch_s:.3g} us to start an operation, {size(machine.bandwidth)}/s and {1e6 * machine.latency_s:.3g} us to one another. Memory is that of the process that needs most; "
            "sent is by one process in one step. One process alone would take "
            f"{milliseconds(1e3 * plan.one.seconds)} and {size(plan.one.memory.total)}.",
            width,
        )
    )
    parts += [wrap(f"Not there: {note}", width) for note in plan.notes[:3]]
    return "\n\n".join(parts)
