"""Cut a chain into stages: the slowest stage as fast as can be, by dynamic programming over positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gossamer.errors import NothingToDo, UsageError
from gossamer.parallel.pipeline.chain import Chain


@dataclass(frozen=True)
class Cut:
    """Where a chain is cut.

    Attributes:
        positions: where each stage begins, and the end: ``stages + 1`` of them.
        seconds: predicted, of each stage and one micro-batch, forward and backward, with what it sends.
        crossing_bytes: at each cut, of one micro-batch in one direction.
        begins: name of the first operation of each stage.
    """

    positions: tuple[int, ...]
    seconds: tuple[float, ...]
    crossing_bytes: tuple[int, ...]
    begins: tuple[str, ...]

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.seconds)

    def __str__(self) -> str:
        rows = [f"stage {i}: from {name}, {1e3 * s:.3g} ms" for i, (name, s) in enumerate(zip(self.begins, self.seconds, strict=True))]
        return "\n".join(rows) + f"\n{', '.join(f'{b / 1024:.4g} KiB' for b in self.crossing_bytes)} between them, each way"


def balanced(seconds: Sequence[float], sending: Sequence[float], stages: int, allowed: Callable[[int, int], bool]) -> tuple[int, ...]:
    """Positions that make the slowest stage fastest; of several such, those that send least.

    Example:
        >>> balanced([1, 1, 2, 4], [0, 9, 1, 1, 0], 2, lambda first, end: True)
        (0, 3, 4)

    Args:
        seconds: of each operation.
        sending: at each position from 0 to ``len(seconds)``, what it takes to send what crosses it, both ways.
        stages: at least 1.
        allowed: whether operations from ``first`` up to ``end`` may be a stage.

    Returns:
        ``stages + 1`` positions, from 0 to ``len(seconds)``.

    Raises:
        NothingToDo: the chain has no such positions.
    """
    n = len(seconds)
    before, send = np.concatenate([[0.0], np.cumsum(seconds)]), np.asarray(sending, dtype=float)
    worst, total = np.full((stages + 1, n + 1), np.inf), np.full((stages + 1, n + 1), np.inf)
    back = np.full((stages + 1, n + 1), -1)
    worst[0, 0] = total[0, 0] = 0.0
    may = np.array([[i < j and allowed(i, j) for i in range(n + 1)] for j in range(n + 1)])
    for s in range(1, stages + 1):
        for j in range(1, n + 1):
            i = np.flatnonzero(may[j] & np.isfinite(worst[s - 1]))
            if not len(i):
                continue
            slowest = np.maximum(worst[s - 1, i], before[j] - before[i] + send[i] + send[j])
            sent = total[s - 1, i] + send[j]
            best = np.lexsort((sent, slowest))[0]
            worst[s, j], total[s, j], back[s, j] = slowest[best], sent[best], i[best]
    if not np.isfinite(worst[stages, n]):
        raise NothingToDo(f"there are no {stages} stages to cut it into")
    positions = [n]
    for s in range(stages, 0, -1):
        positions.append(int(back[s, positions[-1]]))
    return tuple(reversed(positions))


def cut_chain(chain: Chain, stages: int, seconds: Sequence[float], bandwidth: float) -> Cut:
    """Cut a chain into stages, each with something to train.

    Args:
        chain: of a network.
        stages: at least 1.
        seconds: of each operation, forward and backward.
        bandwidth: bytes a second between two stages.

    Raises:
        UsageError: the chain cannot be cut into so many stages; it says why.
    """
    n = len(chain.operations)
    learned = {name for name, p in chain.graph.named_parameters(remove_duplicate=False) if p.requires_grad}
    trained = np.cumsum([0] + [any(w in learned for w in chain.weights(i, i + 1)) for i in range(n)])

    def allowed(first: int, end: int) -> bool:
        return first not in chain.barred and end not in chain.barred and bool(trained[end] > trained[first])

    sizes = [chain.crossing_bytes(p) for p in range(n + 1)]
    try:
        positions = balanced(seconds, [2 * b / bandwidth for b in sizes], stages, allowed)
    except NothingToDo:
        most = next((s for s in range(stages - 1, 0, -1) if _possible(n, s, allowed)), 0)
        reasons = list(dict.fromkeys(chain.barred.values()))
        raise UsageError(
            f"the network cannot be cut into {stages} stages, {most} at most: its {n} operations can be cut at "
            f"{n - 1 - sum(0 < p < n for p in chain.barred)} places" + (f"; elsewhere {'; '.join(reasons[:3])}" if reasons else "")
        ) from None
    spans = list(zip(positions, positions[1:], strict=False))
    return Cut(
        positions,
        tuple(float(sum(seconds[i:j])) + 2 * (sizes[i] + sizes[j]) / bandwidth for i, j in spans),
        tuple(sizes[p] for p in positions[1:-1]),
        tuple(chain.operations[i].name for i, _ in spans),
    )


def _possible(n: int, stages: int, allowed: Callable[[int, int], bool]) -> bool:
    try:
        balanced([0.0] * n, [0.0] * (n + 1), stages, allowed)
    except NothingToDo:
        return False
    return True

