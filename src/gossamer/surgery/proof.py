"""The proof: a pruned network must compute what the original computes with the removed channels' outgoing weights set to zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gossamer.result import Proof
from gossamer.sources.batches import call, outputs
from gossamer.trace import Trace, plain_forward

TOLERANCE = 1e-4
"""Largest relative difference in float32."""


def prove(original: nn.Module, pruned: nn.Module, traced: Trace, removed: Tensor) -> Proof:
    """Compare a pruned network with the zeroed original on the example inputs.

    Removing a channel is the same as nobody reading it: the original with zeros in every weight that consumes a removed channel must give
    the pruned network's outputs, whatever biases and norms did to the channel before.

    Args:
        original: the source network.
        pruned: the cut network.
        traced: the trace of the original.
        removed: bool, shape ``(num_classes,)``; none of them inexact.

    Returns:
        A `Proof`; inexact groups that lose channels are named in it by the caller.
    """
    state = {**dict(original.named_parameters()), **dict(original.named_buffers())}
    zeroed = _Zeroed()
    for (tensor, dim), keep in traced.channels.keep_masks(removed).items():
        if (tensor, dim) in traced.classes.consumers:
            zeroed.add(state[tensor], keep, dim)
    with plain_forward(original), zeroed:
        expected = outputs(call(original, traced.example_inputs))
    with plain_forward(pruned):
        found = outputs(call(pruned, traced.example_inputs))
    names = tuple(g.name for g in traced.channels.groups if bool(removed[g.classes].any()))
    return Proof("zeroed", difference(expected, found), TOLERANCE, names)


class _Zeroed(TorchFunctionMode):
    """Every torch function that is given one of some weights gets it with zeros; a zeroed copy lives no longer than the call."""

    def __init__(self) -> None:
        super().__init__()
        self._masks: dict[int, tuple[Tensor, list[tuple[Tensor, int]]]] = {}

    def add(self, weight: Tensor, keep: Tensor, dim: int) -> None:
        """Zero what ``keep`` (one axis of the weight) leaves out."""
        self._masks.setdefault(id(weight), (weight, []))[1].append((keep, dim))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._with_zeros(args), **self._with_zeros(kwargs or {}))

    def _with_zeros(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._masks:
                return value
            w = value.detach()
            for keep, dim in self._masks[id(value)][1]:
                w = w * _spread(keep.to(w.device), w, dim)
            return w
        if isinstance(value, dict):
            return {k: self._with_zeros(v) for k, v in value.items()}
        return type(value)(map(self._with_zeros, value)) if type(value) in (tuple, list) else value


def _spread(keep: Tensor, weight: Tensor, dim: int) -> Tensor:
    """A keep mask of one axis, broadcastable against the weight."""
    view = [1] * weight.dim()
    if keep.dim() == 2:
        keep = keep.repeat_interleave(weight.shape[0] // keep.shape[0], 0)
        view[0] = weight.shape[0]
    view[dim] = keep.shape[-1]
    return keep.reshape(view).to(weight.dtype)


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest ``max|a - b| / max|a|`` over pairs of tensors; infinite where shapes differ or values are not finite.

    Examples:
        >>> import torch
        >>> difference([torch.tensor([2.0, 4.0])], [torch.tensor([2.0, 3.0])])
        0.25
    """
    if len(expected) != len(found):
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not a.numel():
            continue
        a, b = a.double(), b.double()
        error, scale = float((a - b).abs().max()), float(a.abs().max())
        if error != error or scale != scale:
            return float("inf")
        worst = max(worst, error / scale if scale > 0 else error)
    return worst
