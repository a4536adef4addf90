"""The multiple-choice knapsack: one option for each item, the least total loss whose total cost stays within a budget.

Items are layers, options their ranks, bit widths or methods. Losses of layers, measured one at a time, nearly add up: enough to rank
combinations by, not to predict their loss, which is larger than the sum.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from gossamer.errors import BudgetError, UsageError

NODES = 20_000
"""Of the branch and bound at most: a limit in seconds would make the picks depend on the machine."""
GAP = 1e-6
"""The total loss is within this fraction of the least possible one, unless the nodes run out."""
Array = np.ndarray


def knapsack(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float, *, what: str = "cost") -> list[int]:
    """Pick one option of every item: the least total loss whose total cost is at most ``budget``.

    Examples:
        >>> knapsack([[8, 4, 2], [8, 4]], [[0.0, 0.1, 0.9], [0.0, 0.3]], budget=12)
        [1, 0]

    Args:
        costs: of each option of each item, 0 or more; items may have different numbers of options, at least one.
        losses: of the same options, finite; below zero counts as zero, since it is noise that a strong option measures better than none.
        budget: of the total cost, in its unit.
        what: the unit of ``costs``, for error messages.

    Returns:
        The index of the option picked for each item. Equal arguments give equal picks.

    Raises:
        UsageError: costs and losses of different shapes, no option, negative costs or values that are not finite.
        BudgetError: the cheapest options together cost more than the budget.

    Source: Kellerer, Pferschy and Pisinger, "Knapsack Problems", chapter 11; solved by HiGHS (Huangfu and Hall, Math. Prog. Comp. 2018).
    """
    prices, harms = _checked(costs, losses)
    cheapest = sum(p.min() for p in prices)
    if cheapest > budget * (1 + 1e-9):
        raise BudgetError(f"a {what} of {budget:.6g} cannot be reached: the cheapest options together come to {cheapest:.6g}")
    budget = max(budget, cheapest)
    live = [_undominated(p, h) for p, h in zip(prices, harms, strict=True)]  # indices, cost ascending, loss descending
    bounded = [p[i] for p, i in zip(prices, live, strict=True)], [h[i] for h, i in zip(harms, live, strict=True)]
    mildest = [len(i) - 1 for i in live]
    if sum(p[-1] for p in bounded[0]) <= budget:
        return [int(i[m]) for i, m in zip(live, mildest, strict=True)]
    priced = _priced(*bounded, budget)
    exact = _exact(*bounded, budget, sum(h[i] for h, i in zip(bounded[1], priced, strict=True)))
    chosen = min((c for c in (exact, priced) if c is not None), key=lambda c: sum(h[i] for h, i in zip(bounded[1], c, strict=True)))
    return [int(i[c]) for i, c in zip(live, chosen, strict=True)]


def monotone(losses: Sequence[float]) -> list[float]:
    """Losses of one item's options, listed from the mildest to the severest, as they must be but for noise: never below zero, never falling.

    Without it a tighter budget can seem to lose less than a looser one.

    Examples:
        >>> monotone([-0.01, 0.2, 0.1, 0.5])
        [0.0, 0.2, 0.2, 0.5]
    """
    return [float(v) for v in np.maximum.accumulate(np.maximum(np.asarray(losses, dtype=float), 0.0))]


def _checked(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]]) -> tuple[list[Array], list[Array]]:
    prices, harms = [np.asarray(c, dtype=float) for c in costs], [np.asarray(x, dtype=float) for x in losses]
    if not prices or [p.shape for p in prices] != [h.shape for h in harms] or any(p.ndim != 1 or not len(p) for p in prices):
        raise UsageError("costs and losses need one list of options for each item, of equal lengths, with at least one option")
    if any(not np.isfinite(p).all() or (p < 0).any() for p in prices) or any(not np.isfinite(h).all() for h in harms):
        raise UsageError("costs must be finite and 0 or more, losses finite: leave out options that could not be measured")
    return prices, [np.maximum(h, 0.0) for h in harms]


def _undominated(prices: Array, harms: Array) -> Array:
    """Options that no other one beats in both, cost ascending."""
    order = np.lexsort((harms, prices))
    falling = np.minimum.accumulate(harms[order])
    return order[np.r_[True, falling[1:] < falling[:-1]]]


def _priced(prices: Sequence[Array], harms: Sequence[Array], budget: float) -> list[int]:
    """Picks at the lowest price of a unit of cost, found by bisection, at which the budget holds: feasible, and optimal but for the last item."""

    def at(price: float) -> list[int]:
        return [int(np.argmin(h + price * p)) for p, h in zip(prices, harms, strict=True)]

    def fits(picks: Sequence[int]) -> bool:
        return sum(p[i] for p, i in zip(prices, picks, strict=True)) <= budget

    steps = [np.diff(p).min() for p in prices if len(p) > 1]
    low, high = 0.0, 1e-12 + 2 * max(float(h.max()) for h in harms) / min(steps)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    return at(high)


def _exact(prices: Sequence[Array], harms: Sequence[Array], budget: float, within: float) -> list[int] | None:
    """Branch and bound among totals of at most ``within``; None where the nodes ran out before anything was found."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    cost, loss = np.concatenate(prices), np.concatenate(harms)
    item = np.repeat(np.arange(len(prices)), [len(p) for p in prices])
    one_each = csr_array((np.ones(len(item)), (item, np.arange(len(item)))), shape=(len(prices), len(item)))
    unit, scale = max(budget, 1e-30), max(within, 1e-30)  # the solver's tolerances are absolute
    possible = loss <= within * (1 + 1e-9)
    ends = np.cumsum([len(p) for p in prices])[:-1]
    for slack in (0.0, 2e-6):  # again, a little tighter, where the budget is exceeded within the solver's tolerance
        with _silent():
            found = milp(
                np.where(possible, loss / scale, 0.0),
                integrality=np.ones(len(item)),
                bounds=Bounds(0, possible.astype(float)),
                constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost[None] / unit, -np.inf, budget / unit * (1 - slack))],
                options={"node_limit": NODES, "mip_rel_gap": GAP},
            )
        if found.x is None:
            return None
        picks = [int(np.argmax(part)) for part in np.split(found.x, ends)]
        if sum(p[i] for p, i in zip(prices, picks, strict=True)) <= budget * (1 + 1e-9):
            return picks
    return None


@contextmanager
def _silent() -> Iterator[None]:
    """The solver writes a line of its own to the standard output now and then, which would break what is piped from there."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError):  # there is no standard output
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
