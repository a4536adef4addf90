"""From a budget alone to recipes worth trying: a ladder from mild to severe, and how far a measured artefact misses the budget."""

from __future__ import annotations

from gossamer.flow.job import Job
from gossamer.recipe import Distill, Prune, Quantize, Recipe
from gossamer.report.schema import Report

LADDER = (None, 0.75, 0.5, 0.35, 0.25)  # fraction of the MACs to keep; None: quantise only


def candidates(job: Job) -> list[Recipe]:
    """Recipes from mild to severe; pruned ones are distilled where the job has training data.

    Args:
        job: its budget's ``macs`` leaves out what cannot meet it.
    """
    out = []
    for macs in LADDER:
        if job.budget is not None and job.budget.macs is not None and (macs or 1.0) > job.budget.macs + 1e-9:
            continue
        prune = [Prune(macs=macs, round_to=8)] if macs else []
        train = [Distill(epochs=10)] if macs and job.training is not None else []
        out.append(Recipe.of([*prune, *train, Quantize()]))
    if job.budget is not None and job.budget.macs is not None and job.budget.macs not in LADDER and job.budget.macs < 1:
        train = [Distill(epochs=10)] if job.training is not None else []
        out.insert(0, Recipe.of([Prune(macs=job.budget.macs), *train, Quantize()]))
    return out


def violation(report: Report) -> float:
    """By how much a report misses its budget, summed over the lines as fractions of their limits; 0 where it meets all."""
    return sum((t.reached - t.limit) / max(abs(t.limit), 1e-3) for t in report.budget if not t.met)
