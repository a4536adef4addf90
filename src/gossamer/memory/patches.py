"""The first stage patch by patch: its large tensors never exist as a whole, at the price of borders that are computed twice.

Which stage (up to which tensor) and which grid is chosen for the smallest arena, or for a budget of bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from gossamer.errors import BudgetError, NothingToDo, UsageError
from gossamer.memory.liveness import aligned, lives, peak
from gossamer.memory.program import Program, Step, View
from gossamer.memory.regions import Stage, cut, macs, patch_program, stages

MOST_RECOMPUTED = 0.15
LARGEST_GRID = 8


@dataclass(frozen=True)
class Patching:
    """How the first stage runs.

    Attributes:
        grid: patches along height and width.
        steps: steps of the stage.
        until: the last of them.
        macs: multiply-adds of the whole network without patches.
        recomputed_macs: that patches add.
        without_bytes: the arena without patches.
    """

    grid: tuple[int, int]
    steps: int
    until: str
    macs: int
    recomputed_macs: int
    without_bytes: int

    @property
    def recomputed(self) -> float:
        """Added multiply-adds as a fraction of the network's."""
        return self.recomputed_macs / self.macs


def parse_patches(patches: str | tuple[int, int] | None) -> str | tuple[int, int] | None:
    """``"auto"``, ``"4x4"`` or ``(4, 4)``.

    Examples:
        >>> parse_patches("3x4"), parse_patches("auto")
        ((3, 4), 'auto')
    """
    if patches is None or patches == "auto":
        return patches
    found = re.fullmatch(r"(\d+)[x,](\d+)", patches.strip()) if isinstance(patches, str) else None
    pair = tuple(map(int, found.groups())) if found else patches
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair) or max(pair) < 2:
        raise UsageError(f"patches={patches!r} is no grid: 'auto', '4x4' or (4, 4)")
    return pair[0], pair[1]


def parse_bytes(budget: int | str | None) -> int | None:
    """Bytes of ``"1.5MB"`` or a number.

    Examples:
        >>> parse_bytes("1.5MB"), parse_bytes("100"), parse_bytes(100)
        (1500000, 100, 100)
    """
    from gossamer.recipe import SIZE_UNITS, quantity

    if budget is None:
        return None
    try:
        size = int(quantity(budget, SIZE_UNITS, "ram_budget")) if isinstance(budget, str) and not budget.isdigit() else int(budget)
    except ValueError as e:
        raise UsageError(str(e)) from None
    if size <= 0:
        raise UsageError(f"ram_budget={budget}: must be above 0")
    return size


@dataclass(frozen=True)
class _Candidate:
    """A stage and a grid, the arena they need and the multiply-adds they add."""

    stage: Stage
    grid: tuple[int, int]
    arena: int
    added: int


def patched(
    program: Program, grid: str | tuple[int, int] | None, budget: int | None, *, inplace: bool, without: int
) -> tuple[Program, Patching]:
    """The program with its first stage as one step that goes patch by patch.

    Args:
        program: steps in order.
        grid: ``"auto"``, a grid, or None where the budget chooses.
        budget: bytes of the arena, or None.
        inplace: as for the plan.
        without: bytes of the arena without patches.
    """
    total = sum(macs(s) for s in program.steps)
    most_added = MOST_RECOMPUTED * total
    search = partial(_candidates, program, grid if isinstance(grid, tuple) else None, inplace, most_added=most_added)
    found = list(search(math.inf if budget is None else budget, wants_smallest=budget is None))
    if budget is not None and not any(c.arena <= budget for c in found):
        found = list(search(math.inf, wants_smallest=True))
    if not found:
        if budget is not None and grid is None:
            raise BudgetError(f"the arena takes {without} bytes, more than ram_budget={budget}, and no stage can run patch by patch")
        what = f"as {grid[0]} x {grid[1]} patches" if isinstance(grid, tuple) else "patch by patch"
        raise NothingToDo(f"no stage at the start of the network can run {what}: it needs convolutions and pooling from the input on")
    smallest = min(found, key=lambda c: (c.arena, c.added))
    if budget is not None:
        fitting = [c for c in found if c.arena <= budget]
        if not fitting:
            raise BudgetError(f"ram_budget={budget} bytes cannot be met: the smallest arena with patches takes {smallest.arena} bytes")
        chosen = min(fitting, key=lambda c: (c.added, c.arena))
    elif isinstance(grid, tuple):
        chosen = smallest
    else:
        cheap = [c for c in found if c.added <= most_added and c.arena < without]
        if not cheap:
            raise NothingToDo(
                f"no patches make the arena of {without} bytes smaller at {MOST_RECOMPUTED:.0%} more multiply-adds: give a grid"
            )
        chosen = min(cheap, key=lambda c: (c.arena, c.added))
    last = chosen.stage.steps[-1].name
    return cut(program, chosen.stage, chosen.grid, inplace), Patching(
        chosen.grid, len(chosen.stage.steps), last, total, chosen.added, without
    )


def _candidates(
    program: Program, grid: tuple[int, int] | None, inplace: bool, limit: float, *, wants_smallest: bool, most_added: float
) -> Iterator[_Candidate]:
    """Stages and grids; not those whose remaining network is above the limit already, nor above an arena found where the smallest is wanted."""
    for stage in stages(program):
        rest = _rest(program, stage, inplace)
        if rest > limit:
            continue
        own = sum(macs(s) for s in stage.steps)
        fixed = aligned(program.sizes[stage.image.buffer], 64) + aligned(program.sizes[stage.result.buffer], 64)
        for g in [grid] if grid is not None else _grids(stage.result):
            if g[0] > stage.result.shape[2] or g[1] > stage.result.shape[3]:
                continue
            inner = patch_program(stage, g)
            if inner is None:
                continue
            steps = inner.program.steps
            height = peak(lives(inner.program, inplace=inplace), len(steps))
            added = g[0] * g[1] * sum(macs(s) for s in steps) - own
            arena = max(rest, fixed + height)
            if grid is None and wants_smallest and added <= most_added:
                limit = min(limit, arena)
            yield _Candidate(stage, g, arena, added)


def _grids(result: View) -> list[tuple[int, int]]:
    """Square and nearly square grids up to `LARGEST_GRID`."""
    most = range(1, LARGEST_GRID + 1)
    return [(a, b) for a in most for b in most if a * b > 1 and max(a, b) <= 2 * min(a, b)]


def _rest(program: Program, stage: Stage, inplace: bool) -> int:
    """Peak of the network with the stage as one step without scratch."""
    one = Step("stage", "copy", (stage.image,), (stage.result,))
    shorter = replace(program, steps=(one, *program.steps[len(stage.steps) :]))
    return peak(lives(shorter, inplace=inplace), len(shorter.steps))
