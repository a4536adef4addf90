"""Hold a cut network's forward pass against its trace: every operation must see the shapes and the scalars that the trace predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.adapters import free_attention
from gossamer.sources.batches import call
from gossamer.surgery.prediction import Prediction, Shape
from gossamer.trace import Sites, Step, Trace, plain_forward, rule_of, scalars_of

_COPIES = frozenset(["clone", "contiguous", "detach", "alias", "lift_fresh", "_to_copy"])
_OPAQUE = frozenset(["linear", "einsum", "tensordot", "matmul", "__matmul__", "__rmatmul__", "scaled_dot_product_attention"])
_ALIASES = {"_unsafe_view": "view", "_reshape_alias": "view", "reshape": "view"}


class Diverged(Exception):
    """The pass does something else than predicted."""


class Check(TorchDispatchMode):
    """Compares every operation that gives tensors with the step of the trace, and stops at the first that differs.

    Args:
        traced: of the original.
        predict: of the cut network.
        stops: whether the pass ends there, by `Diverged`; else the rest goes unwatched.
    """

    def __init__(self, traced: Trace, predict: Prediction, *, stops: bool = True) -> None:
        super().__init__()
        self.steps, self.predict = traced.steps, predict
        self.at = 0
        self.what = ""
        self._stops = stops
        self._site = -1
        self._last_of = {step.site: i for i, step in enumerate(traced.steps)}
        self._inside: list[Shape] | None = None
        self._result: tuple[int, Shape] | None = None

    def at_site(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A numbered call begins; of a contraction only the result counts, because what it is made of depends on which sizes are 1."""
        self._site += 1
        self._inside = [] if name in _OPAQUE and self._inside is None else self._inside
        return args, kwargs

    def off_site(self) -> None:
        """It ends."""
        if self._inside is None:
            return
        made, self._inside = self._inside, None
        last = self._last_of.get(self._site, -1)
        if last < self.at or not made:
            return
        self._result = last, made[-1]
        self.at = last + 1

    def finish(self) -> None:
        """Compare what the last contraction gave; later, because computing here would be watched too."""
        if self._result is None:
            return
        (at, shape), self._result = self._result, None
        predicted = self.predict.shapes(self.steps[at])[0]
        if predicted not in (None, shape):
            self.at = at
            self._stop(f"gives shape {shape} where {predicted} was expected")

    def complete(self) -> bool:
        """Whether the pass, which is over, did all that was predicted."""
        if not self.what:
            self.finish()
        return not self.what and all(s.op in _COPIES for s in self.steps[self.at :])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.finish()
        out = func(*args, **kwargs)
        if self.what:
            return out
        name = rule_of(func)[0]
        if self._inside is not None:
            self._inside += [tuple(t.shape) for t in _tensors(out)[:1]]
        elif name not in _COPIES:  # whether a reshape has to copy depends on how many heads are left, for example
            shapes = [tuple(t.shape) for t in _tensors(out)]
            if shapes:
                while self.at < len(self.steps) and self.steps[self.at].op in _COPIES:
                    self.at += 1
                self._compare(_ALIASES.get(name, name), shapes, args, kwargs)
        return out

    def _compare(self, name: str, shapes: list[Shape], args: Any, kwargs: Any) -> None:
        if self.at >= len(self.steps):
            return self._stop(f"runs {name} after its last operation")
        step = self.steps[self.at]
        if name != _ALIASES.get(step.op, step.op):
            return self._stop(f"runs {name} instead of {step.op}")
        predicted = self.predict.shapes(step)
        if name == "expand":  # repeated to the size of something else, which is looked at where they meet
            predicted, shapes = [_unrepeated(p, args[0].shape) for p in predicted], [_unrepeated(s, args[0].shape) for s in shapes]
        if any(p is not None and p != s for p, s in zip(predicted, shapes, strict=False)):
            return self._stop(f"gives shape {shapes[0]} where {predicted[0]} was expected")
        scalars = scalars_of(step.op, args, kwargs)
        if len(scalars) == len(step.scalars) and not all(map(_close, scalars, step.scalars)):
            return self._stop(f"computes with {scalars[0]:.4g} where the original has {step.scalars[0]:.4g}")
        self.at += 1

    def _stop(self, what: str) -> None:
        self.what = what
        if self._stops:
            raise Diverged


def _unrepeated(shape: Any, before: Sequence[int]) -> Any:
    """A shape with 1 along the dimensions that an expansion repeats."""
    if shape is None:
        return None
    lead = len(shape) - len(before)
    return (*(1,) * lead, *(1 if n == 1 else s for s, n in zip(shape[lead:], before, strict=True)))


def _close(a: float, b: float) -> bool:
    return isclose(a, b, rel_tol=1e-6) or (a != a and b != b)


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)] if out is not None else []


@dataclass(frozen=True)
class Divergence:
    """Where a pass went another way.

    Attributes:
        step: index into the trace's steps.
        what: happened there.
        raised: whether the code refused to go on, rather than computing something else.
    """

    step: int
    what: str
    raised: bool = False


def first_divergence(model: nn.Module, traced: Trace, removed: Tensor) -> Divergence | None:
    """Where a cut network first does something else than its trace predicts.

    Args:
        model: the cut network.
        traced: of the original.
        removed: bool, shape ``(num_classes,)``.

    Returns:
        The step and what happened there; None where the pass runs as predicted.
    """
    check = Check(traced, Prediction(traced, removed))
    with plain_forward(model), free_attention(model):
        try:
            with Sites(check.at_site, check.off_site), check:
                call(model, traced.example_inputs)
            complete = check.complete()
        except Diverged:
            return Divergence(check.at, check.what)
        except Exception as e:
            if check.what:  # user code caught and wrapped it
                return Divergence(check.at, check.what)
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            at = next((i for i in range(check.at, len(traced.steps)) if traced.steps[i].op not in _COPIES), len(traced.steps) - 1)
            return Divergence(at, reason, raised=True)
    if check.what:
        return Divergence(check.at, check.what)
    if not complete:
        return Divergence(len(traced.steps) - 1, f"runs {check.at} operations instead of {len(traced.steps)}")
    return None


def classes_through(step: Step, traced: Trace) -> Tensor:
    """bool of shape ``(num_classes,)``: the classes that go through a step."""
    found = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    of = torch.from_numpy(traced.classes.of)
    for plane in (*step.inputs, *(p for planes in step.outputs for p in planes)):
        ids = of[plane].reshape(-1)
        found[ids[ids >= 0]] = True
    return found
