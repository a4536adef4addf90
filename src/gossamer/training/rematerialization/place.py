"""Choose what is computed twice: the least time such that every moment of the step fits the budget."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from gossamer.training.rematerialization.measure import Choice, Measured


def place(measured: Measured, budget_bytes: float | None, *, forbidden: Collection[tuple[str, str]] = ()) -> list[Choice] | None:
    """The cheapest choices that fit; with None, those of the smallest peak, and among them the cheapest.

    Args:
        measured: of a plain step.
        budget_bytes: for what is alive during the step, beside what was alive before it.
        forbidden: pairs of block and mode that do not work.

    Returns:
        The choices, in the order of the network; None where nothing fits.
    """
    choices = [c for c in measured.choices if (c.block, c.mode) not in forbidden]
    n = len(choices)
    if not n:
        return [] if budget_bytes is None or measured.timeline.peak_bytes <= budget_bytes else None
    scale = max(1.0, float(measured.timeline.peak_bytes))
    saved = np.array([c.saved_bytes for c in choices]) / scale
    seconds = np.array([max(c.seconds, 1e-6) for c in choices])
    seconds = seconds / seconds.sum()
    rows, limits = [], []
    for most, dormant in measured.intervals:  # most - sum of savings <= peak, the last variable
        rows.append(np.append([-s if c.block in dormant else 0.0 for c, s in zip(choices, saved, strict=True)], -1.0))
        limits.append(-most / scale)
    inner = {name for c in choices for name in measured.marks[c.block].nested}
    for leaf in {c.block for c in choices}:  # of a block and all that contain it at most one
        if leaf in inner or not any(leaf in measured.marks[c.block].nested for c in choices):
            covering = [c.block == leaf or leaf in measured.marks[c.block].nested for c in choices]
            rows.append(np.append(np.array(covering, dtype=float), 0.0))
            limits.append(1.0)
    a, upper = np.array(rows), np.array(limits)
    if budget_bytes is None:  # the smallest peak first
        cost = np.append(1e-4 * seconds, 1.0)
        top = np.inf
    else:
        cost = np.append(seconds, 0.0)
        top = budget_bytes / scale
    if top < 0:
        return None
    solved = milp(
        cost,
        constraints=LinearConstraint(a, -np.inf, upper),
        integrality=np.append(np.ones(n), 0),
        bounds=Bounds(np.zeros(n + 1), np.append(np.ones(n), top)),
        options={"time_limit": 20.0, "mip_rel_gap": 1e-3},
    )
    if solved.x is None:
        return None
    return [c for c, x in zip(choices, solved.x, strict=False) if x > 0.5]
