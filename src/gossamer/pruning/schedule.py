"""Pruning in several steps, with whatever recovers the network in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from gossamer.errors import NothingToDo, UsageError, near
from gossamer.plan import Plan
from gossamer.profiling.targets import latency_fraction
from gossamer.pruning.prune import check_form, in_form, one_target, prune, within
from gossamer.result import Proof, Result, network_of
from gossamer.sources.batches import check_inputs

SCHEDULES = ("one_shot", "iterative", "cubic")
"""Names of the schedules."""


def fractions(schedule: str, steps: int) -> list[float]:
    """How much of the whole reduction is reached after each step.

    ``"iterative"`` takes equal parts; ``"cubic"`` takes ``1 - (1 - t/n)^3`` (Zhu & Gupta, 2017): most early, while there is much to spare.

    Examples:
        >>> fractions("iterative", 4), fractions("cubic", 2)
        ([0.25, 0.5, 0.75, 1.0], [0.875, 1.0])

    Args:
        schedule: ``"one_shot"``, ``"iterative"`` or ``"cubic"``.
        steps: at least 1; 1 for ``"one_shot"``.

    Raises:
        UsageError: an unknown schedule, or a number of steps that does not go with it.
    """
    if schedule not in SCHEDULES:
        raise UsageError(f"schedule={schedule!r}: known are {', '.join(SCHEDULES)}{near(str(schedule), SCHEDULES)}")
    if steps < 1 or (schedule == "one_shot" and steps != 1):
        raise UsageError(f"steps={steps}: at least 1, and exactly 1 for schedule='one_shot'")
    if schedule == "cubic":
        return [1 - (1 - t / steps) ** 3 for t in range(1, steps + 1)]
    return [t / steps for t in range(1, steps + 1)]


def prune_in_steps(
    model: nn.Module | Result,
    example_inputs: Any,
    *,
    schedule: str = "cubic",
    steps: int = 5,
    recover: Callable[[nn.Module, int], nn.Module] | None = None,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | str | None = None,
    calibration: Iterable[Any] | None = None,
    form: str = "module",
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Result:
    """Prune in several steps and recover the network after each; importance is measured anew every time.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)).eval()
        >>> trained = []
        >>> def recover(network, step):
        ...     trained.append(network[0].out_features)
        ...     return network
        >>> result = prune_in_steps(net, (torch.zeros(1, 4),), ratio=0.5, schedule="iterative", steps=2, recover=recover)
        >>> trained, result.model[0].out_features, result.proof.holds
        ([48, 32], 32, True)

    Args:
        model: the network, or a `Result`, whose plan is continued; it is not changed.
        example_inputs: a tuple of positional inputs, or a dict of keyword inputs.
        schedule: ``"iterative"`` (equal parts), ``"cubic"`` (most early) or ``"one_shot"``.
        steps: how many times to prune.
        recover: called with the pruned network and the step (from 0); returns the network to go on with, a trained copy for example
            (``lambda network, step: gs.fit(network, data).model``). Build any optimiser there: one that was built before a step holds
            parameters that are no longer part of the network.
        ratio, macs, params, latency: the target of the last step, exactly one of them, as for `prune`.
        calibration: batches, for every step.
        form: of the network at the end, as for `prune`; ``recover`` always gets a module.
        progress: called with steps done and all.
        options: of every step, as for `prune`.

    Returns:
        A `Result` whose plan holds the edits of all steps, and whose proof is the one with the largest difference.

    Raises:
        UsageError: an unknown schedule, or options that `prune` does not take.
        BudgetError: the target cannot be reached.
        NothingToDo: no step finds anything to prune.
    """
    given, model = model, network_of(model, "prune")
    check_form(form)
    final, kind = one_target(ratio=ratio, macs=macs, params=params, latency=latency)
    example_inputs = check_inputs(example_inputs)
    if kind == "latency":
        final = within(latency_fraction(final, model, example_inputs, threads=int(options.get("threads", 1))), latency)
    assert isinstance(final, float)
    parts = fractions(schedule, steps)
    network, done = model, 1.0
    results: list[Result] = []
    notes: list[str] = []
    for i, part in enumerate(parts):
        goal = (1 - (1 - final) * part) / done
        if goal < 1 - 1e-9:
            now: dict[str, Any] = {**options, kind: 1 - goal if kind == "ratio" else goal}
            try:
                made = prune(network, example_inputs, calibration=calibration, **now)
            except NothingToDo as e:
                notes.append(f"step {i + 1}: {e}")
            else:
                results.append(made)
                network = made.model
                if kind == "ratio":
                    done *= goal
                elif kind == "latency":
                    done = 1 - (1 - final) * part
                else:
                    done = getattr(made.after, kind) / getattr(results[0].before, kind)
        if recover is not None and results:
            network = recover(network, i)
        if progress is not None:
            progress(i + 1, len(parts))
    if not results:
        raise NothingToDo("; ".join(notes))
    proofs = [r.proof for r in results if r.proof is not None]
    result = Result(
        model=network,
        plan=Plan(edits=tuple(e for r in results for e in r.plan.edits), inputs=results[0].plan.inputs),
        before=results[0].before,
        after=results[-1].after,
        proof=max(proofs, key=_difference),
        example_inputs=example_inputs,
        notes=tuple(dict.fromkeys([*notes, *(n for r in results for n in r.notes)])),
    )
    return in_form(given.then(result) if isinstance(given, Result) else result, form)


def _difference(proof: Proof) -> float:
    return -1.0 if proof.difference is None else proof.difference
