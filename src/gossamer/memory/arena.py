"""Addresses: stretches of memory that live at the same time never overlap, and the arena is as small as it can be made.

Greedy by size first; where that misses the bound, a local search over the order of placing; where that misses it too and the
problem is small, an integer program, which also proves how small an arena can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gossamer.memory.liveness import Life

PLACEMENTS = 30_000
"""Lives placed by the local search, over all its trials."""
NODES = 50
"""Of the integer program's branch and bound."""
PAIRS = 600
"""Of lives that live together: with more of them, the integer program finds nothing in those nodes."""
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """Addresses of lives.

    Attributes:
        offsets: bytes from the start of the arena, one for each life.
        size: bytes of the arena.
        optimal: whether no smaller arena can hold these lives.
        method: ``"greedy"``, ``"search"`` or ``"integer program"``.
    """

    offsets: tuple[int, ...]
    size: int
    optimal: bool
    method: str


def place(lives: Sequence[Life], bound: int, *, seed: int = 0) -> Placement:
    """Give every life an address.

    Examples:
        >>> lives = [Life("a", (0,), 128, 0, 1), Life("b", (1,), 64, 1, 2), Life("c", (2,), 128, 2, 3)]
        >>> place(lives, 192)
        Placement(offsets=(0, 128, 0), size=192, optimal=True, method='greedy')

    Args:
        lives: stretches of memory; sizes are multiples of the alignment, so addresses are too.
        bound: bytes that live together at the worst moment.
        seed: of the local search, which stops by a count of trials that depends on the size of the problem, not by time: equal lives get
            equal addresses on every machine.
    """
    sizes = np.array([x.size for x in lives], dtype=np.int64)
    first = np.array([x.first for x in lives], dtype=np.int64)
    last = np.array([x.last for x in lives], dtype=np.int64)
    if not len(lives):
        return Placement((), 0, True, "greedy")
    conflict = (first[:, None] <= last[None]) & (first[None] <= last[:, None])
    length = last - first + 1
    orders = [np.lexsort((-length, -sizes)), np.lexsort((first, -sizes)), np.lexsort((-sizes, -length)), np.lexsort((-sizes, first))]
    orders.append(np.argsort(-sizes * length, kind="stable"))
    best, offsets, chosen = None, None, orders[0]
    for order in orders:
        found = _by_order(order, sizes, conflict)
        height = int((found + sizes).max())
        if best is None or height < best:
            best, offsets, chosen = height, found, order
        if best == bound:
            break
    assert best is not None and offsets is not None
    method = "greedy"
    if best > bound:
        better = _search(chosen, best, bound, sizes, conflict, seed)
        if better is not None:
            offsets, method = better, "search"
            best = int((offsets + sizes).max())
    optimal = best == bound
    if not optimal:
        solved = _integer_program(sizes, conflict, best, bound)
        if solved is not None:
            offsets, proved = solved
            best, method, optimal = int((offsets + sizes).max()), "integer program", proved
    return Placement(tuple(int(o) for o in offsets), best, optimal, method)


def _by_order(order: Ints, sizes: Ints, conflict: npt.NDArray[np.bool_]) -> Ints:
    """Each in turn at the lowest address where it fits among those already placed that live with it."""
    offsets = np.zeros(len(sizes), dtype=np.int64)
    placed = np.zeros(len(sizes), dtype=bool)
    for i in order:
        near = np.flatnonzero(conflict[i] & placed)
        offsets[i] = _gap(offsets[near], sizes[near], int(sizes[i]))
        placed[i] = True
    return offsets


def _gap(starts: Ints, sizes: Ints, size: int) -> int:
    """The smallest hole that is large enough, or the end."""
    if not len(starts):
        return 0
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(starts[order] + sizes[order])
    holes = np.concatenate(([0], ends[:-1]))
    room = starts - holes
    fits = room >= size
    return int(holes[fits][np.argmin(room[fits])]) if fits.any() else int(ends[-1])


def _search(order: Ints, best: int, bound: int, sizes: Ints, conflict: npt.NDArray[np.bool_], seed: int) -> Ints | None:
    """Place earlier what sticks out at the top, now and then exchange two at random; keep what is no worse."""
    rng = np.random.default_rng(seed)
    found = None
    current, height = order.copy(), best
    offsets = _by_order(current, sizes, conflict)
    for _ in range(min(4000, PLACEMENTS // len(sizes))):
        if best == bound:
            break
        trial = current.copy()
        tops = np.flatnonzero(offsets[trial] + sizes[trial] > max(bound, 0))
        i = int(rng.choice(tops)) if len(tops) and rng.random() < 0.7 else int(rng.integers(len(trial)))
        j = int(rng.integers(0, max(1, i))) if rng.random() < 0.8 else int(rng.integers(len(trial)))
        moved = trial[i]
        trial = np.insert(np.delete(trial, i), j, moved)
        placed = _by_order(trial, sizes, conflict)
        reached = int((placed + sizes).max())
        if reached <= height or rng.random() < 0.02:
            current, height, offsets = trial, reached, placed
        if reached < best:
            best, found = reached, placed
    return found


def _integer_program(sizes: Ints, conflict: npt.NDArray[np.bool_], best: int, bound: int) -> tuple[Ints, bool] | None:
    """Addresses by HiGHS, and whether they are proved to be the best; None where it finds nothing better than ``best``.

    Of each pair that lives together one lies below the other; one binary a pair decides which.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    unit = int(np.gcd.reduce(np.append(sizes, [best, bound])))
    n, pairs = len(sizes), [(i, j) for i, j in zip(*np.nonzero(np.triu(conflict, 1)), strict=True)]
    if len(pairs) > PAIRS:
        return None
    s, top = sizes / unit, best / unit
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    low: list[float] = []
    for k, (i, j) in enumerate(pairs):
        for sign, a, b in ((1, i, j), (-1, j, i)):  # o_b - o_a + M z >= s_a, o_a - o_b - M z >= s_b - M
            row = len(low)
            rows += [row] * 3
            columns += [b, a, n + 1 + k]
            values += [1.0, -1.0, sign * top]
            low.append(s[a] if sign > 0 else s[a] - top)
    for i in range(n):
        row = len(low)
        rows += [row, row]
        columns += [n, i]
        values += [1.0, -1.0]
        low.append(s[i])
    width = n + 1 + len(pairs)
    matrix = coo_matrix((values, (rows, columns)), shape=(len(low), width)).tocsr()
    cost = np.zeros(width)
    cost[n] = 1.0
    lower, upper = np.zeros(width), np.concatenate((top - s, [top], np.ones(len(pairs))))
    lower[n] = bound / unit
    integrality = np.concatenate((np.zeros(n + 1), np.ones(len(pairs))))
    solved = milp(
        cost, constraints=LinearConstraint(matrix, np.array(low), np.inf), bounds=Bounds(lower, upper), integrality=integrality,
        options={"node_limit": NODES},
    )  # fmt: skip
    if solved.x is None:
        return None
    below = solved.x[n + 1 :] < 0.5
    offsets = _longest_path(sizes, pairs, below)
    height = int((offsets + sizes).max())
    if height > best or (height == best and solved.status != 0):
        return None
    return offsets, bool(solved.status == 0)


def _longest_path(sizes: Ints, pairs: Sequence[tuple[int, int]], below: npt.NDArray[np.bool_]) -> Ints:
    """Whole addresses from who lies below whom."""
    under: list[list[int]] = [[] for _ in sizes]
    for (i, j), first in zip(pairs, below, strict=True):
        under[j if first else i].append(i if first else j)
    offsets = np.zeros(len(sizes), dtype=np.int64)
    for _ in range(len(sizes)):
        new = np.array([max((offsets[a] + sizes[a] for a in u), default=0) for u in under], dtype=np.int64)
        if (new == offsets).all():
            break
        offsets = new
    return offsets
