"""Activation memory of a watched forward pass, as a planner would share it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm"})


class Timeline:
    """Which operation reads and writes which storage, and what lives together at the worst moment.

    A storage lives from the operation that makes it to the last that reads it, whatever Python holds on to. An operation element by element,
    and batch norm, which is folded, write over an input that ends there; a convolution adds to the other side of a sum that nothing else reads.
    Inputs count, weights do not. `gossamer.plan_memory` knows the same rules and more of them, and gives addresses.
    """

    def __init__(self, weights: Collection[int]) -> None:
        self._weights = weights
        self._numbers: dict[int, tuple[StorageWeakRef, int]] = {}
        self._sizes: list[int] = []
        self._first: list[int] = []
        self._last: list[int] = []
        self._reads: list[int] = []
        self._first_read: list[int] = []
        self._maker: list[str] = []
        self._over: list[tuple[int, int, list[int], bool]] = []
        self._steps = 0
        self._inputs = 0
        self._done = False

    def start(self, inputs: Iterable[Tensor]) -> None:
        """The network's inputs; a second pass of the same network is not looked at."""
        self._done = bool(self._steps)
        if self._done:
            return
        for t in inputs:
            self._number(t, -1, "input")
        self._inputs = len(self._sizes)

    def step(self, op: str, reads: Sequence[Tensor], writes: Sequence[Tensor], func: torch._ops.OpOverload) -> None:
        """An operation, in execution order."""
        if self._done:
            return
        now, self._steps = self._steps, self._steps + 1
        read = list(dict.fromkeys(n for t in reads if (n := self._known(t)) is not None))
        for n in read:
            self._last[n] = now
            self._first_read[n] = self._first_read[n] if self._reads[n] else now
            self._reads[n] += 1
        made = len(self._sizes)
        for t in writes:
            self._number(t, now, op)
        if op == "add_" and len(read) == 2 and self._sizes[read[0]] == self._sizes[read[1]]:
            self._over.append((now, read[0], read, True))
        if len(self._sizes) == made + 1 and read and (torch.Tag.pointwise in func.tags or op in _NORMS):
            self._over.append((now, made, [n for n in read if self._sizes[n] == self._sizes[made]], op == "add"))

    def finish(self) -> None:
        """What is still held when the pass is over, its inputs aside, lives to the end."""
        for ref, n in self._numbers.values() if not self._done else ():
            if n >= self._inputs and not ref.expired():
                self._last[n] = self._steps

    def peak(self) -> int:
        """Bytes that live together at the worst moment."""
        first, last = list(self._first), list(self._last)
        root = list(range(len(first)))
        conv = [op == "convolution" for op in self._maker]
        for now, made, candidates, is_sum in self._over:
            ends = [n for n in candidates if last[root[n]] == now and n != made]
            if is_sum and len(candidates) == 2 and len(ends) == (1 if made in candidates else 2):
                first_made, second_made = sorted(candidates, key=lambda n: first[root[n]])
                early, late = root[first_made], root[second_made]
                alone = self._first_read[second_made] == now and (late == second_made or self._reads[late] == 1)
                if conv[late] and alone and early != late:  # the convolution adds where the other side lies
                    last[early] = last[root[made]]
                    root = [early if r in (late, root[made]) else r for r in root]
                    conv[early] = False
                    continue
            if ends and made not in candidates:
                root[made] = root[ends[0]]
                last[root[made]] = last[made]
                conv[root[made]] &= not is_sum
        change = [0] * (self._steps + 3)
        for n, r in enumerate(root):
            if n == r:
                change[first[n] + 1] += self._sizes[n]
                change[last[n] + 2] -= self._sizes[n]
        worst = live = 0
        for c in change:
            live += c
            worst = max(worst, live)
        return worst

    def _known(self, t: Tensor) -> int | None:
        found = self._numbers.get(t.untyped_storage()._cdata) if t.layout is torch.strided else None
        return None if found is None or found[0].expired() else found[1]

    def _number(self, t: Tensor, now: int, op: str) -> None:
        if t.layout is not torch.strided:
            return
        storage = t.untyped_storage()
        if storage._cdata in self._weights or self._known(t) is not None:
            return
        self._numbers[storage._cdata] = StorageWeakRef(storage), len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._first.append(now)
        self._last.append(now)
        self._reads.append(0)
        self._first_read.append(-1)
        self._maker.append(op)
