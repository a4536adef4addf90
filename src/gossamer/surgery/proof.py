"""The proof: a pruned network must compute what the original computes with the removed channels' outgoing weights set to zero."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.func import functional_call

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
    zeroed: dict[str, Tensor] = {}
    state = {**dict(original.named_parameters()), **dict(original.named_buffers())}
    for (tensor, dim), keep in traced.channels.keep_masks(removed).items():
        if (tensor, dim) in traced.classes.consumers:
            w = zeroed.get(tensor, state[tensor].detach())
            zeroed[tensor] = w * _spread(keep.to(w.device), w, dim)
    with plain_forward(original):
        expected = outputs(functional_call(original, zeroed, _positional(traced), _keyword(traced)))
    with plain_forward(pruned):
        found = outputs(call(pruned, traced.example_inputs))
    names = tuple(g.name for g in traced.channels.groups if bool(removed[g.classes].any()))
    return Proof("zeroed", difference(expected, found), TOLERANCE, names)


def _positional(traced: Trace) -> tuple[Tensor, ...]:
    return () if isinstance(traced.example_inputs, dict) else tuple(traced.example_inputs)


def _keyword(traced: Trace) -> dict[str, Tensor]:
    return dict(traced.example_inputs) if isinstance(traced.example_inputs, dict) else {}


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

    Example:
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
