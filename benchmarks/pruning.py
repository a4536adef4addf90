"""One-shot pruning of a pretrained network without training, with and without compensation, at several fractions of the MACs.

Beside it, where torch-pruning is installed: the best of its magnitude pruning, chosen globally and per layer, with batch norms re-estimated.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from typing import Any

import torch
from _photographs import Task, arguments, load
from torch import nn

import gossamer as gs
from gossamer.profiling import evaluate
from gossamer.pruning import reestimate_batch_norm

EXAMPLE = (torch.zeros(1, 3, 224, 224),)
TARGETS = (0.9, 0.8, 0.7)


def main() -> None:
    """Print the table."""
    task = load(arguments(__doc__ or ""))
    print(f"{task.name}, {torch.get_num_threads()} threads, torch {torch.__version__}; 100 photographs for calibration, nothing trained")
    print(f"original: {evaluate(task.model, task.evaluation)}")
    print(f"{'MACs':>6} {'how':>34} {'top-1':>32} {'MACs reached':>13} {'proof':>9} {'took':>7}")
    for macs in TARGETS:
        for compensate in (False, True):
            started = time.perf_counter()
            result = gs.prune(task.model, EXAMPLE, macs=macs, calibration=task.calibration, compensate=compensate)
            assert result.proof is not None
            how = "gossamer, compensated" if compensate else "gossamer, batch norms re-estimated"
            row(task, macs, how, result.model, result.after.macs / result.before.macs, f"{result.proof.difference:.1e}", started)
        if importlib.util.find_spec("torch_pruning"):
            for scope in ("global", "layer"):
                started = time.perf_counter()
                model, reached = torch_pruning(task, macs, scope)
                row(task, macs, f"torch-pruning, {scope}, re-estimated", model, reached, "none", started)


def row(task: Task, macs: float, how: str, model: nn.Module, reached: float, proof: str, started: float) -> None:
    """One line of the table."""
    took = time.perf_counter() - started
    found = evaluate(model.eval(), task.evaluation).accuracy
    assert found is not None
    top1 = f"{found.value:.1%} ({found.interval[0]:.1%} to {found.interval[1]:.1%})"
    print(f"{macs:6.2f} {how:>34} {top1:>32} {reached:13.3f} {proof:>9} {took:6.0f}s", flush=True)


def torch_pruning(task: Task, macs: float, scope: str) -> tuple[nn.Module, float]:
    """Its magnitude pruning at the ratio that just meets the target, found by bisection."""
    import torch_pruning as tp

    before = gs.profile(task.model, EXAMPLE).macs

    def pruned(ratio: float) -> tuple[nn.Module, float]:
        model: Any = copy.deepcopy(task.model)
        last = [m for m in model.modules() if isinstance(m, nn.Linear)]
        pruner = tp.pruner.MagnitudePruner(
            model,
            EXAMPLE,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            global_pruning=scope == "global",
            ignored_layers=last,
        )
        pruner.step()
        return model, gs.profile(model, EXAMPLE).macs / before

    low, high = 0.0, 0.6
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if pruned(middle)[1] <= macs else (middle, high)
    model, reached = pruned(high)
    reestimate_batch_norm(model, task.calibration, EXAMPLE)
    return model, reached


if __name__ == "__main__":
    main()
