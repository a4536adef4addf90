"""What each block saves and costs when it is computed twice: measured once, in one plain step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.training.rematerialization.allocations import Marks, Timeline, busy_ns, marking, record
from gossamer.training.rematerialization.recompute import DEAR, Mode
from gossamer.training.stepping import Stepper


@dataclass(frozen=True)
class Choice:
    """A block computed twice in one mode.

    Attributes:
        block: name of the module.
        mode: ``"full"`` or ``"selective"``.
        saved_bytes: that are free while the block is dormant.
        seconds: that it adds to a step.
    """

    block: str
    mode: Mode
    saved_bytes: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """One plain step, as far as placing checkpoints needs it.

    Attributes:
        choices: what may be computed twice.
        intervals: for each part of the step the most that is alive, and the blocks that are dormant in it.
        marks: of every module.
        timeline: of the plain step.
        seconds: of the forward pass, for each block that is called once.
    """

    choices: tuple[Choice, ...]
    intervals: tuple[tuple[int, frozenset[str]], ...]
    marks: dict[str, Marks]
    timeline: Timeline
    seconds: dict[str, float]


def measure(run: Stepper, work: Callable[[], None]) -> Measured:
    """Run two plain steps: one for what is alive when, one for the time of each operation."""
    with marking(run.model, run.device) as marks:
        timeline = record(work, run.device)
    with dear_operations(run.model, run.device) as dear, marking(run.model, run.device, busy=True) as timed:
        work()
    seconds = {name: (m.end_ns - m.start_ns) * 1e-9 for name, m in timed.items() if m.calls == 1}
    blocks = {n: m for n, m in marks.items() if m.calls == 1 and m.backward_ns is not None and m.inputs and n in seconds}
    choices: list[Choice] = []
    for name, m in blocks.items():
        saved = timeline.at(m.end_ns) - timeline.at(m.start_ns) - m.output_bytes
        kept_bytes, kept_seconds = dear.get(name, (0, 0.0))
        choices.append(Choice(name, "full", saved, seconds[name]))
        if kept_bytes:
            choices.append(Choice(name, "selective", saved - kept_bytes, max(0.0, seconds[name] - kept_seconds)))
    useful = tuple(c for c in choices if c.saved_bytes > 65536 and marks[c.block].nested)
    return Measured(useful, _intervals(timeline, {c.block: marks[c.block] for c in useful}), marks, timeline, seconds)


def _intervals(timeline: Timeline, blocks: dict[str, Marks]) -> tuple[tuple[int, frozenset[str]], ...]:
    """Between two marks nothing falls asleep or wakes up: one constraint each; those that another implies are left out."""
    ends = sorted({t for m in blocks.values() for t in (m.end_ns, m.backward_ns) if t is not None})
    times = [
        int(timeline.times_ns[0]) - 1 if len(timeline.times_ns) else 0,
        *ends,
        int(timeline.times_ns[-1]) if len(timeline.times_ns) else 0,
    ]
    worst: dict[frozenset[str], int] = {}
    for start, end in pairwise(times):
        dormant = frozenset(n for n, m in blocks.items() if m.backward_ns is not None and m.end_ns <= start and end <= m.backward_ns)
        worst[dormant] = max(worst.get(dormant, 0), timeline.highest(start, end))
    return tuple((most, dormant) for dormant, most in worst.items())


class _Dear(TorchDispatchMode):
    """Adds up bytes and seconds of the dear operations in the block that is running."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.inside = device, []  # type: ignore[var-annotated]
        self.found: dict[str, tuple[int, float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in DEAR or not self.inside:
            return func(*args, **(kwargs or {}))
        started = busy_ns(self.device)
        out = func(*args, **(kwargs or {}))
        took = (busy_ns(self.device) - started) * 1e-9
        size = sum(t.untyped_storage().nbytes() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
        for name in self.inside:
            had = self.found.get(name, (0, 0.0))
            self.found[name] = (had[0] + size, had[1] + took)
        return out


@contextmanager
def dear_operations(model: nn.Module, device: torch.device) -> Iterator[dict[str, tuple[int, float]]]:
    """For each module, output bytes and seconds of the operations in `DEAR` of its forward pass."""
    mode = _Dear(device)
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: mode.inside.append(name)))
            handles.append(module.register_forward_hook(lambda _m, _a, _o: mode.inside.pop() and None))
    try:
        with mode:
            yield mode.found
    finally:
        for handle in handles:
            handle.remove()
