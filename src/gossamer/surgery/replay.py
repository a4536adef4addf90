"""Hold a cut network's forward pass against its trace: every operation must see the shapes that the labels predict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.sources.batches import call
from gossamer.trace import Trace, plain_forward
from gossamer.trace._rules import rule_of
from gossamer.trace._watch import Step


class _Shapes(TorchDispatchMode):
    """Names and output shapes of every operation that gives tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        shapes = tuple(tuple(t.shape) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
        if shapes:
            self.seen.append((rule_of(func)[0], shapes))
        return out


def first_divergence(model: nn.Module, traced: Trace, removed: Tensor) -> tuple[int, str] | None:
    """Where a cut network first does something else than its trace predicts.

    Args:
        model: the cut network.
        traced: of the original.
        removed: bool, shape ``(num_classes,)``.

    Returns:
        Index of the step and what happened there; None where the pass runs as predicted.
    """
    watch = _Shapes()
    failure: str | None = None
    with plain_forward(model):
        try:
            with watch:
                call(model, traced.example_inputs)
        except Exception as e:
            failure = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
    for i, (step, (name, shapes)) in enumerate(zip(traced.steps, watch.seen, strict=False)):
        if name != step.op:
            return i, f"runs {name} instead of {step.op}"
        predicted = predict(step, traced, removed)
        if any(p is not None and p != s for p, s in zip(predicted, shapes, strict=False)):
            return i, f"gives shape {shapes[0]} where {predicted[0]} was expected"
    if failure is not None:
        return min(len(watch.seen), len(traced.steps) - 1), failure
    if len(watch.seen) != len(traced.steps):
        return len(traced.steps) - 1, f"runs {len(watch.seen)} operations instead of {len(traced.steps)}"
    return None


def predict(step: Step, traced: Trace, removed: Tensor) -> list[tuple[int, ...] | None]:
    """Output shapes of a step once classes are gone; None where a box does not stay rectangular."""
    out: list[tuple[int, ...] | None] = []
    gone = torch.cat([removed, torch.zeros(1, dtype=torch.bool)])  # class -1: not a channel
    of = torch.from_numpy(traced.classes.of)
    for shape, planes in zip(step.shapes, step.outputs, strict=True):
        size: list[int] | None = list(shape)
        for plane in planes:
            stays = ~gone[of[plane]]
            dims = [d for d, n in enumerate(plane.shape) if n > 1]
            count = 1
            for d in dims:
                left = int(stays.movedim(d, 0).flatten(1).any(1).sum())
                count *= left
                if size is not None:
                    size[d] = left
            if dims and count != int(stays.sum()):
                size = None
                break
        out.append(tuple(size) if size is not None else None)
    return out


def classes_through(step: Step, traced: Trace) -> Tensor:
    """bool of shape ``(num_classes,)``: the classes that go through a step."""
    found = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    of = torch.from_numpy(traced.classes.of)
    for plane in (*step.inputs, *(p for planes in step.outputs for p in planes)):
        ids = of[plane].reshape(-1)
        found[ids[ids >= 0]] = True
    return found
