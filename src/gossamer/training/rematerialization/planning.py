"""Place checkpoints under a budget, and verify the peak by measuring it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import BudgetError, SourceError, UsageError
from gossamer.recipe import SIZE_UNITS, quantity
from gossamer.training.optimizers import state_bytes
from gossamer.training.rematerialization.allocations import leaving_no_trace, one_step, record
from gossamer.training.rematerialization.measure import Choice, Measured, measure
from gossamer.training.rematerialization.place import place
from gossamer.training.rematerialization.recompute import recomputing
from gossamer.training.rematerialization.report import BlockMemory, MemoryReport
from gossamer.training.stepping import Stepper

ATTEMPTS = 8
"""Steps that are measured to come close to the budget from below."""
CLOSE = 0.93
"""A measured peak of so much of the budget is close enough."""


@dataclass
class _Tried:
    peak_bytes: int
    choices: list[Choice]

    @property
    def seconds(self) -> float:
        return sum(c.seconds for c in self.choices)


@contextmanager
def plan_memory(
    run: Stepper, data: Iterable[Any], budget: str | int | None, *, optimizer_in_backward: bool = False, accumulates: bool = False
) -> Iterator[MemoryReport]:
    """Measure a step on the first batch, place checkpoints where the budget asks for them, and hold them while this is open.

    Args:
        run: what steps are made with; its network is as before afterwards.
        data: batches; the first one stands for all.
        budget: ``"400MB"`` or bytes; None measures only.
        optimizer_in_backward: gradients are freed as they are used.
        accumulates: gradients of earlier batches are there when a batch begins.

    Raises:
        UsageError: the budget is not a size.
        BudgetError: it cannot be met; the smallest reachable peak is named.
    """
    limit = as_bytes(budget)
    raw = next(iter(data), None)
    if raw is None:
        raise SourceError("the data is empty: memory is measured on its first batch")
    batch = run.prepare(raw)
    with leaving_no_trace(run):
        work = one_step(run, raw, free_gradients=optimizer_in_backward, keep_gradients=accumulates)
        work()  # whatever is allocated once and for all
        weights = sum(p.numel() * p.element_size() for p in run.model.parameters())
        state, update = optimizer_memory(run)
        static = _static_bytes(run, batch, state)
        trained = [p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad]
        gradients = max(trained) if optimizer_in_backward else sum(trained)
        floor = static + gradients + update
        static += gradients if accumulates else 0
        measured = measure(run, work)
        plain = _Tried(measured.timeline.peak_bytes, [])
        tried = plain if limit is None or static + plain.peak_bytes <= limit else _search(run, work, measured, limit, static)
    peak = max(floor, static + tried.peak_bytes)
    if limit is not None and peak > limit:
        raise BudgetError(
            f"memory_budget={budget} cannot be met: the smallest peak that was reached is {peak / 1e6:.0f} MB, of which weights, optimiser "
            f"state and inputs take {static / 1e6:.0f} MB; use a smaller batch with accumulate, or another optimizer"
        )
    report = MemoryReport(
        peak_bytes=peak,
        plain_peak_bytes=max(floor, static + plain.peak_bytes),
        weight_bytes=weights,
        gradient_bytes=gradients,
        optimizer_state_bytes=state,
        other_bytes=static - weights - state - (gradients if accumulates else 0),
        budget_bytes=limit,
        blocks=_blocks(measured, tried.choices),
        choices={c.block: c.mode for c in tried.choices},
        timeline=_thin(measured),
    )
    with recomputing(run.model, report.choices):
        yield report


def as_bytes(budget: str | int | None) -> int | None:
    """A budget as bytes; UsageError where it is none.

    Examples:
        >>> as_bytes("400MB"), as_bytes(1024)
        (400000000, 1024)
    """
    if budget is None:
        return None
    try:
        value = int(quantity(budget, SIZE_UNITS, "memory_budget")) if isinstance(budget, str) else int(budget)
    except ValueError as e:
        raise UsageError(str(e)) from None
    if value <= 0:
        raise UsageError(f"memory_budget={budget}: must be above 0")
    return value


def optimizer_memory(run: Stepper) -> tuple[int, int]:
    """Bytes of the optimiser's state, and of what a step allocates beside it: from a step on copies of the weights."""
    groups = []
    for group in run.optimizer.param_groups:
        copies = [p.detach().clone().requires_grad_() for p in group["params"]]
        for copy in copies:
            copy.grad = torch.zeros_like(copy)
        groups.append({**group, "params": copies})
    trial = type(run.optimizer)(groups, lr=run.lr)  # type: ignore[call-arg]
    trial.step()
    held = state_bytes(trial)
    return held, record(lambda: trial.step(), run.device).peak_bytes


def _static_bytes(run: Stepper, batch: Any, state: int) -> int:
    holder = run.objective
    modules = [run.model, run.average, getattr(holder, "adapters", None), *getattr(holder, "teachers", [])]
    tensors: list[Tensor] = [t for m in modules if m is not None for t in (*m.parameters(), *m.buffers())]
    tensors += [t for t in torch.utils._pytree.tree_leaves(tuple(batch)) if isinstance(t, Tensor)]
    return state + sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _search(run: Stepper, work: Any, measured: Measured, limit: int, static: int) -> _Tried:
    """Correct what the program is told until what is measured fits, and comes close."""
    room = limit - static
    forbidden: set[tuple[str, str]] = set()
    fits: list[_Tried] = []
    misses: list[_Tried] = []
    seen: dict[tuple[tuple[str, str], ...], int] = {}
    target, low, high = float(room), 0.0, float("inf")
    for _ in range(ATTEMPTS):
        choices = place(measured, target, forbidden=forbidden)
        if choices is None:
            low = target
            target = (target + high) / 2 if high < float("inf") else target * 1.15 + 1e6
            if low > 1.6 * room:
                break
            continue
        key = tuple((c.block, c.mode) for c in choices)
        if key not in seen:
            peak = _peak(run, work, choices)
            if peak is None:
                forbidden |= {(c.block, c.mode) for c in choices if c.mode == "selective"} or set(key)
                continue
            seen[key] = peak
            (fits if peak <= room else misses).append(_Tried(peak, choices))
        peak = seen[key]
        if peak > room:
            high = min(high, target)
            target = max((low + high) / 2, target - 1.05 * (peak - room)) if low else target - 1.05 * (peak - room)
        elif static + peak >= CLOSE * limit:
            break
        else:
            low = max(low, target)
            target = (low + high) / 2 if high < float("inf") else target + 0.8 * (room - peak)
    if fits:
        return min(fits, key=lambda t: t.seconds)
    least = place(measured, None, forbidden=forbidden) or []
    peak = _peak(run, work, least) if least else measured.timeline.peak_bytes
    if peak is not None:
        misses.append(_Tried(peak, least))
    return min(misses, key=lambda t: t.peak_bytes)


def _peak(run: Stepper, work: Any, choices: list[Choice]) -> int | None:
    """The measured peak with these choices; None where a block does not bear to be computed twice."""
    try:
        with recomputing(run.model, {c.block: c.mode for c in choices}):
            return record(work, run.device).peak_bytes
    except RuntimeError:
        return None


def _blocks(measured: Measured, choices: list[Choice]) -> tuple[BlockMemory, ...]:
    """The outermost blocks that hold more than one layer, and layers outside of them, in order."""
    chosen = {c.block: c for c in choices}
    marks = {n: m for n, m in measured.marks.items() if m.calls == 1}
    largest = max((len(m.nested) for m in marks.values()), default=0)
    wide = {n for n, m in marks.items() if len(m.nested) > max(8, 0.5 * largest)}  # a body that holds most of the network is no block
    rows: list[BlockMemory] = []
    covered: set[str] = set()
    for name, m in sorted(marks.items(), key=lambda item: item[1].start_ns):
        if name in wide or name in covered:
            continue
        covered |= set(m.nested)
        saved = max(0, measured.timeline.at(m.end_ns) - measured.timeline.at(m.start_ns))
        inside = [chosen[n] for n in (name, *m.nested) if n in chosen]
        rows.append(
            BlockMemory(
                name, saved, max(0, saved - sum(c.saved_bytes for c in inside)), measured.seconds.get(name, 0.0), _mode(name, inside)
            )
        )
    return tuple(rows)


def _mode(name: str, inside: list[Choice]) -> str:
    if not inside:
        return ""
    return inside[0].mode if inside[0].block == name else f"{len(inside)} parts"


def _thin(measured: Measured, points: int = 72) -> tuple[int, ...]:
    """The highest value in each of so many equal parts of the events of a plain step."""
    live = measured.timeline.live_bytes
    return tuple(int(part.max()) for part in torch.tensor(live).tensor_split(min(points, len(live))) if part.numel())
