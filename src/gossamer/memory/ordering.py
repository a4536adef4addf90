"""Another order of the steps, where one lowers the peak: exact over the partial order where that is small, by beam search where not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gossamer.memory.liveness import aligned, spans, takes
from gossamer.memory.program import Program

EXACT_STATES = 20_000
BEAM = 64


@dataclass(frozen=True)
class Ordering:
    """An order of steps.

    Attributes:
        order: indices of the program's steps.
        peak: bytes that live together at the worst moment.
        bound: bytes below which no order can be.
        exact: whether no order has a lower peak.
    """

    order: tuple[int, ...]
    peak: int
    bound: int
    exact: bool


def reordered(program: Program, order: Sequence[int]) -> Program:
    """The program in another order."""
    return replace(program, steps=tuple(program.steps[i] for i in order))


def dependencies(program: Program) -> list[set[int]]:
    """For each step, those that must come before it."""
    before: list[set[int]] = [set() for _ in program.steps]
    writers, sizes = program.writers(), program.sizes
    whole = {b for b, ws in writers.items() if any(v.buffer == b and v.bytes == sizes[b] for w in ws for v in program.steps[w].writes)}
    touched: dict[int, list[tuple[int, bool]]] = {}
    for i, step in enumerate(program.steps):
        for view in step.read_views():
            before[i] |= {j for j, writes in touched.get(view.buffer, []) if writes}
        for view in step.writes:
            if view.buffer in whole:
                before[i] |= {j for j, _ in touched.get(view.buffer, [])}
        for view in step.read_views():
            touched.setdefault(view.buffer, []).append((i, False))
        for view in step.writes:
            touched.setdefault(view.buffer, []).append((i, True))
        before[i].discard(i)
    return before


class _Memory:
    """What lives after a set of steps, as a bit mask, has run; it does not depend on their order."""

    def __init__(self, program: Program, inplace: bool, alignment: int) -> None:
        first, _ = spans(program)
        steps = program.steps
        self.size = {b: aligned(program.sizes[b], alignment) for b in first}
        self.users = dict.fromkeys(first, 0)
        self.pinned = program.pinned()
        self.inputs = {v.buffer for v in program.inputs if v is not None}
        self.touches: list[set[int]] = []
        for i, step in enumerate(steps):
            views = {v.buffer for v in (*step.writes, *step.read_views())}
            self.touches.append(views)
            for b in views:
                self.users[b] |= 1 << i
        self.scratch = [aligned(s.scratch, alignment) for s in steps]
        self.takes = [takes(s, program.sizes, first, i) if inplace else [] for i, s in enumerate(steps)]
        self.start = sum(self.size[b] for b in self.inputs)

    def run(self, mask: int, live: int, step: int) -> tuple[int, int]:
        """Peak while a step runs after the steps in ``mask``, and what lives after it."""
        bit = 1 << step
        after = mask | bit
        grown = freed = 0
        for b in self.touches[step]:
            users = self.users[b]
            if not users & mask and b not in self.inputs:
                grown += self.size[b]
            if users & after == users and b not in self.pinned:
                freed += self.size[b]
        peak = live + grown + self.scratch[step]
        for b in self.takes[step]:
            if self.users[b] & after == self.users[b] and b not in self.pinned:
                peak -= self.size[b]
                break
        return peak, live + grown - freed


def bound_over_orders(program: Program, *, inplace: bool = True, alignment: int = 64) -> int:
    """Bytes below which no order of the steps can be: what each step touches, and what must live across it in any order."""
    before = dependencies(program)
    memory = _Memory(program, inplace, alignment)
    n = len(program.steps)
    above, below = [0] * n, [0] * n
    for i in range(n):
        for j in before[i]:
            above[i] |= above[j] | 1 << j
    for i in reversed(range(n)):
        for j in before[i]:
            below[j] |= below[i] | 1 << i
    writers, readers = program.writers(), program.readers()
    worst = memory.start
    everyone = {b: (sum(1 << w for w in set(writers.get(b, []))), sum(1 << r for r in set(readers.get(b, [])))) for b in memory.size}
    for i in range(n):
        total, taken = memory.scratch[i], 0
        for b, size in memory.size.items():
            if b in memory.touches[i]:
                total += size
            else:
                made, read = everyone[b]
                begun = b in memory.inputs or bool(made & above[i])
                total += size if begun and (b in memory.pinned or bool((read | made) & below[i])) else 0
        for b in memory.takes[i]:
            if b not in memory.pinned and not memory.users[b] & below[i]:
                taken = max(taken, memory.size[b])
        worst = max(worst, total - taken)
    return worst


def best_order(program: Program, *, inplace: bool = True, alignment: int = 64) -> Ordering:
    """The order with the lowest peak.

    Where the order as given already meets the bound over all orders, it stays. Otherwise every set of steps that can have run is looked
    at (dynamic programming over the partial order), or the `BEAM` best of each length where there are more than `EXACT_STATES`.
    """
    memory = _Memory(program, inplace, alignment)
    given = tuple(range(len(program.steps)))
    peak = _peak(memory, given)
    bound = bound_over_orders(program, inplace=inplace, alignment=alignment)
    if peak <= bound or len(given) < 3:
        return Ordering(given, peak, bound, True)
    before = dependencies(program)
    needs = [sum(1 << j for j in b) for b in before]
    after_it: list[list[int]] = [[] for _ in given]
    for i, b in enumerate(before):
        for j in b:
            after_it[j].append(i)
    level: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (memory.start, memory.start, tuple(i for i in given if not needs[i]))}
    parents: list[dict[int, tuple[int, int]]] = []
    states, exact = 0, True
    for _ in given:
        following: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        came: dict[int, tuple[int, int]] = {}
        for mask, (so_far, live, ready) in level.items():
            for i in ready:
                during, then = memory.run(mask, live, i)
                high, after = max(so_far, during), mask | 1 << i
                if high >= peak:
                    continue
                old = following.get(after)
                if old is None:
                    freed = [j for j in after_it[i] if needs[j] & after == needs[j]]
                    following[after] = (high, then, tuple(sorted([j for j in ready if j != i] + freed)))
                    came[after] = (mask, i)
                elif high < old[0]:
                    following[after] = (high, then, old[2])
                    came[after] = (mask, i)
        states += len(following)
        if not following:
            return Ordering(given, peak, bound, exact)
        if len(following) > BEAM and states > EXACT_STATES:
            exact = False
            kept = sorted(following, key=lambda m: (following[m][0], following[m][1]))[:BEAM]
            following = {m: following[m] for m in kept}
        parents.append(came)
        level = following
    mask = (1 << len(given)) - 1
    order: list[int] = []
    reached = level[mask][0]
    for came in reversed(parents):
        mask, i = came[mask]
        order.append(i)
    return Ordering(tuple(reversed(order)), reached, bound, exact or reached == bound)


def _peak(memory: _Memory, order: Sequence[int]) -> int:
    """Bytes that live together at the worst moment of an order."""
    mask, live, worst = 0, memory.start, memory.start
    for i in order:
        during, live = memory.run(mask, live, i)
        worst, mask = max(worst, during), mask | 1 << i
    return worst
