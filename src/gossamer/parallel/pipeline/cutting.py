"""Cut a chain into stages: the slowest stage as fast as can be, by dynamic programming over positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

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


Allowed = Callable[[np.ndarray, int], np.ndarray]
"""Whether operations from each of some positions up to one may be a stage."""


class Balance:
    """For each number of stages up to a largest, positions that make the slowest stage fastest; of several such, those that send least.

    Examples:
        >>> balance = Balance([1, 1, 2, 4], [0, 9, 1, 1, 0], 3, lambda firsts, end: firsts < end)
        >>> balance.positions(2), balance.positions(3)
        ((0, 3, 4), (0, 2, 3, 4))

    Args:
        seconds: of each operation.
        sending: at each position from 0 to ``len(seconds)``, what it takes to send what crosses it, both ways.
        most: stages, at least 1.
        allowed: called with positions before ``end`` and ``end``.
    """

    def __init__(self, seconds: Sequence[float], sending: Sequence[float], most: int, allowed: Allowed) -> None:
        n = len(seconds)
        before, send = np.concatenate([[0.0], np.cumsum(seconds)]), np.asarray(sending, dtype=float)
        worst, total = np.full((most + 1, n + 1), np.inf), np.full((most + 1, n + 1), np.inf)
        self._back = np.full((most + 1, n + 1), -1)
        worst[0, 0] = total[0, 0] = 0.0
        for j in range(1, n + 1):
            firsts = np.arange(j)[np.broadcast_to(allowed(np.arange(j), j), (j,))]
            if not len(firsts):
                continue
            alone = before[j] - before[firsts] + send[firsts] + send[j]
            slowest = np.maximum(worst[:most, firsts], alone)
            sent = total[:most, firsts] + send[j]
            best = np.lexsort((sent, slowest), axis=-1)[:, 0]
            at = np.arange(most)
            worst[1:, j], total[1:, j], self._back[1:, j] = slowest[at, best], sent[at, best], firsts[best]
        self.slowest = worst[:, n]
        """Seconds of the slowest stage, by their number; infinite where there are not so many."""

    def positions(self, stages: int) -> tuple[int, ...]:
        """``stages + 1`` positions, from 0 to the end; NothingToDo where there are none."""
        if not np.isfinite(self.slowest[stages]):
            raise NothingToDo(f"there are no {stages} stages to cut it into")
        positions = [self._back.shape[1] - 1]
        for s in range(stages, 0, -1):
            positions.append(int(self._back[s, positions[-1]]))
        return tuple(reversed(positions))

    @property
    def most(self) -> int:
        """The most stages that there are."""
        return int(np.flatnonzero(np.isfinite(self.slowest)).max(initial=0))


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
    sizes = [chain.crossing_bytes(p) for p in range(len(chain.operations) + 1)]
    balance = Balance(seconds, [2 * b / bandwidth for b in sizes], stages, places(chain))
    if balance.most < stages:
        raise UsageError(too_many(chain, stages, balance.most))
    positions = balance.positions(stages)
    spans = list(pairwise(positions))
    return Cut(
        positions,
        tuple(float(sum(seconds[i:j])) + 2 * (sizes[i] + sizes[j]) / bandwidth for i, j in spans),
        tuple(sizes[p] for p in positions[1:-1]),
        tuple(chain.operations[i].name for i, _ in spans),
    )


def places(chain: Chain) -> Allowed:
    """Where a chain can be cut, so that each stage has something to train."""
    n = len(chain.operations)
    learned = {name for name, p in chain.graph.named_parameters(remove_duplicate=False) if p.requires_grad}
    trained = np.cumsum([0] + [any(w in learned for w in chain.weights(i, i + 1)) for i in range(n)])
    open_ = np.array([p not in chain.barred for p in range(n + 1)])

    def allowed(firsts: np.ndarray, end: int) -> np.ndarray:
        may: np.ndarray = open_[firsts] & open_[end] & (trained[end] > trained[firsts])
        return may

    return allowed


def too_many(chain: Chain, stages: int, most: int) -> str:
    """Why there are not so many stages."""
    n = len(chain.operations)
    reasons = list(dict.fromkeys(chain.barred.values()))
    return (
        f"the network cannot be cut into {stages} stages, {most} at most: its {n} operations can be cut at "
        f"{n - 1 - sum(0 < p < n for p in chain.barred)} places" + (f"; elsewhere {'; '.join(reasons[:3])}" if reasons else "")
    )
