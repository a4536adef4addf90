"""Ranks allocated to a budget: over all layers together, what the network's outputs lose is as small as the sum of single losses can tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from gossamer.calibration import Batches, Divergence, Halves, best_together, exchanged, samples_of
from gossamer.errors import BudgetError, NothingToDo, UsageError
from gossamer.lowrank.fitting import Fitted
from gossamer.lowrank.layers import Site
from gossamer.lowrank.options import Option, fit_all, ladder, losses, smoothed, timed
from gossamer.plan import apply_structure
from gossamer.profiling import benchmark
from gossamer.profiling.targets import latency_fraction, measured_fraction
from gossamer.result import ExampleInputs, Profile
from gossamer.search import knapsack

POWERS = (1.0, 0.5, 2.0)
"""Sums of losses predict joint losses only roughly: allocations by these powers of the losses are compared by the loss of the whole network."""
ATTEMPTS = 3
"""Times that a latency target is allocated for, where the network as a whole measures slower than its layers."""


@dataclass(frozen=True)
class Budget:
    """``kind`` is ``"macs"``, ``"params"`` or ``"latency"``; ``value`` a fraction of the original's, or milliseconds as ``"5ms"``."""

    kind: str
    value: float | str


def allocate(
    model: nn.Module,
    sites: Mapping[str, Site],
    methods: Sequence[str],
    budget: Budget,
    before: Profile,
    inputs: ExampleInputs,
    batches: Batches | None,
    far: Divergence | None,
    *,
    only_faster: bool,
    unit: int | None,
    threads: int | None,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Option], dict[str, Fitted], list[str]]:
    """Choose a method and ranks for layers, or none, so that the budget holds and the outputs change least.

    Args:
        model: the network; it is changed and put back.
        sites: its layers by name.
        methods: to choose from.
        budget: to meet.
        before: the network's profile.
        inputs: example inputs.
        batches: calibration data, or None.
        far: measures losses, or None without data.
        only_faster: options that are not faster in the runtime are dropped.
        unit: ranks are multiples of it.
        threads: of ONNX Runtime; None times nothing.
        seed: of CP.
        progress: called with steps done and all.

    Returns:
        Options and fitted layers by name, and notes.

    Raises:
        BudgetError: the budget is out of reach.
        NothingToDo: no layer has an option.
    """
    options, notes = _options(sites, methods, budget, only_faster, unit, threads)
    if not any(options.values()):
        raise NothingToDo("no layer has ranks that would pay" + (f" ({'; '.join(notes)})" if notes else ""))
    halves = Halves(model, {n: sites[n].layer for n, found in options.items() if found}, batches)
    lost = losses(model, options, sites, halves, far, macs=before.macs / samples_of(inputs), seed=seed, progress=progress)
    if far is None:
        notes.append("losses by relative weight error, which ranks layers poorly: pass calibration data")

    def best(candidates: Sequence[dict[str, Option]]) -> tuple[dict[str, Option], dict[str, Fitted]]:
        layers = {n: s.layer for n, s in sites.items()}
        return best_together(model, layers, candidates, lambda wanted, apart: fit_all(halves, wanted, sites, seed, apart=apart), far)

    choose = _Chooser(sites, options, lost, budget, before)
    if budget.kind != "latency":
        target = float(budget.value) * choose.whole
        picks, fitted = best([choose.within(target, p) for p in POWERS])
        return picks, fitted, notes
    assert threads is not None
    aim = latency_fraction(budget.value, model, inputs, threads=threads)
    if not 0 < aim < 1:
        raise UsageError(f"latency={budget.value!r} is {aim:.2f} of the original's: give less than it takes now")
    choose.calibrate(model, inputs, threads)
    over, found = 0.0, list[tuple[float, dict[str, Option], dict[str, Fitted], str]]()
    for _ in range(ATTEMPTS):
        try:
            candidates = [choose.within((aim - over) * choose.whole, p) for p in POWERS]
        except BudgetError:
            if not found:
                raise
            break
        picks, fitted = best(candidates)
        true, said = measured_fraction(model, _copied(model, sites, fitted), inputs, threads=threads)
        found.append((true, picks, fitted, said))
        if true <= aim * 1.03:
            break
        over += true - aim
    true, picks, fitted, said = min(found, key=lambda f: (max(f[0], aim * 1.03), -found.index(f)))
    return picks, fitted, [*notes, said + ("" if true <= aim * 1.03 else f", above the target of {aim:.2f}")]


def _options(
    sites: Mapping[str, Site], methods: Sequence[str], budget: Budget, only_faster: bool, unit: int | None, threads: int | None
) -> tuple[dict[str, list[Option]], list[str]]:
    """Options that save something, by layer."""
    out: dict[str, list[Option]] = {}
    slow = []
    for name, site in sites.items():
        options = [o for o in ladder(site, methods, unit=unit) if budget.kind != "params" or o.params < site.params]
        if options and threads is not None and (only_faster or budget.kind == "latency"):
            options = smoothed(timed(site, options, threads=threads))
            if not any(o.pays for o in options):
                slow.append(name)
            options = [o for o in options if o.pays]
        out[name] = options
    notes = []
    if slow:
        more = f" and {len(slow) - 3} more" if len(slow) > 3 else ""
        notes.append(f"left alone, not faster in ONNX Runtime at any rank: {', '.join(slow[:3])}{more}")
    return out, notes


class _Chooser:
    """Costs and losses of every option, ready for the knapsack."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        options: Mapping[str, Sequence[Option]],
        lost: Mapping[str, Mapping[tuple[str, tuple[int, ...]], float]],
        budget: Budget,
        before: Profile,
    ) -> None:
        self.names = [n for n, found in options.items() if found]
        self.options: list[list[Option | None]] = [[None, *options[n]] for n in self.names]
        self.lost = [[0.0, *(lost[n][o.method, o.ranks] for o in options[n])] for n in self.names]
        self.kind = budget.kind
        if self.kind == "latency":
            kept = [float(options[n][0].before_ms or 0.0) for n in self.names]
            self.costs = [[k, *(float(o.ms or 0.0) for o in options[n])] for k, n in zip(kept, self.names, strict=True)]
            self.whole = sum(kept)
        else:
            macs = self.kind == "macs"
            kept = [float(sites[n].macs if macs else sites[n].params) for n in self.names]
            self.costs = [[k, *(float(o.macs if macs else o.params) for o in options[n])] for k, n in zip(kept, self.names, strict=True)]
            self.whole = float(before.macs if macs else before.params)
        self.rest = self.whole - sum(kept)

    def calibrate(self, model: nn.Module, inputs: ExampleInputs, threads: int) -> None:
        """The time of the whole network, what its layers do not account for included."""
        whole = whole_ms(model, inputs, threads)
        layers = sum(c[0] for c in self.costs)
        if whole < layers:  # alone they are slower than in the network: shrink them all alike
            self.costs = [[v * whole / layers for v in c] for c in self.costs]
            layers = whole
        self.whole, self.rest = whole, whole - layers

    def within(self, target: float, power: float) -> dict[str, Option]:
        """The picks of least loss, to a power, within a target for the whole network."""
        least = self.rest + sum(min(c) for c in self.costs)
        if target < least * (1 - 1e-9):
            raise BudgetError(
                f"cannot reach {target / self.whole:.3f} of the {self.kind}: the lowest possible is {least / self.whole:.3f}; "
                "more methods, no runtime= or a shorter ignore= allow for less"
            )
        lost = [[v**power for v in row] for row in self.lost]
        picks = knapsack(self.costs, lost, target - self.rest, what=self.kind)
        chosen = ((n, options[i]) for n, options, i in zip(self.names, self.options, picks, strict=True))
        return {n: o for n, o in chosen if o is not None}


def whole_ms(model: nn.Module, inputs: ExampleInputs, threads: int) -> float:
    """Milliseconds of a network in ONNX Runtime."""
    return benchmark(model, example_inputs=inputs, threads=threads).rows[0].median_ms


def _copied(model: nn.Module, sites: Mapping[str, Site], fitted: Mapping[str, Fitted]) -> nn.Module:
    """A copy of the network with layers exchanged."""
    with exchanged(model, {sites[n].layer: f.module for n, f in fitted.items()}) as changed:
        return apply_structure(changed, [])
