"""What training minimises: a function of outputs and target, or of the network and a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.errors import SourceError, UsageError, near
from gossamer.sources.batches import Batch, outputs

Objective = Callable[[nn.Module, Batch], Tensor]
"""From the network and a batch to one number."""


def logits_of(out: Any) -> Tensor:
    """The tensor that a loss is taken of: a network's output, or the first tensor in it (main before auxiliary heads).

    Raises:
        UsageError: there is no tensor in it.
    """
    tensors = outputs(out)
    if not tensors:
        raise UsageError(f"the network returned a {type(out).__name__} without tensors: give an objective of your own")
    return tensors[0]


def cross_entropy(out: Any, target: Any) -> Tensor:
    """Cross-entropy of logits (N, C) or (N, C, ...) with class indices or probabilities, mean over the batch and positions.

    Examples:
        >>> import torch
        >>> round(cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3])).item(), 4)
        1.3863

    Args:
        out: what the network returned; its first tensor is the logits.
        target: class indices (N) or (N, ...), or probabilities of the shape of the logits.

    Returns:
        The mean, a tensor without dimensions.

    Raises:
        SourceError: there is no target, or a label is beyond the network's outputs.
    """
    z_NC = logits_of(out)
    check_labels(z_NC, target)
    return F.cross_entropy(z_NC, target)


def check_labels(z_NC: Tensor, target: Any) -> None:
    """SourceError where ``target`` is missing, or holds (on the CPU, where looking is free) a label beyond the C outputs."""
    if not isinstance(target, Tensor):
        raise SourceError("a batch has no target: give (inputs, labels), or an objective that needs none")
    if z_NC.dim() < 2 or target.is_floating_point() or target.device.type != "cpu" or not target.numel():
        return
    if int(target.max()) >= z_NC.shape[1]:
        raise SourceError(f"a label is {int(target.max())}, but the network has {z_NC.shape[1]} outputs: build it with more classes")


OBJECTIVES: Mapping[str, Callable[[Any, Any], Tensor]] = {
    "cross_entropy": cross_entropy,
    "mse": lambda out, target: F.mse_loss(_regressed(out, target), target),
    "l1": lambda out, target: F.l1_loss(_regressed(out, target), target),
    "huber": lambda out, target: F.huber_loss(_regressed(out, target), target),
    "bce": lambda out, target: F.binary_cross_entropy_with_logits(_regressed(out, target), target.to(logits_of(out).dtype)),
}
"""Objectives by name; ``"bce"`` takes logits."""


def _regressed(out: Any, target: Any) -> Tensor:
    value = logits_of(out)
    if not isinstance(target, Tensor) or target.shape != value.shape:
        found = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise SourceError(f"the network returns {tuple(value.shape)} and the target is {found}: this objective needs the same shape")
    return value


def as_objective(objective: str | Callable[..., Tensor] | None) -> Objective:
    """The loss to minimise as a function of network and batch.

    Examples:
        >>> import torch
        >>> loss = as_objective(nn.MSELoss())
        >>> loss(nn.Identity(), Batch((torch.ones(2),), {}, torch.zeros(2))).item()
        1.0

    Args:
        objective: ``(outputs, target) -> loss``; or, where the first parameter is called ``model``, ``(model, batch) -> loss`` with a
            `gossamer.sources.Batch`; or a name, ``"cross_entropy"``, ``"mse"``, ``"l1"``, ``"huber"``, ``"bce"``; None is `cross_entropy`.
            One with a method ``progress`` is told before each step how much of the training, in [0, 1], is done. One with a method ``prepare``
            is given the network and a batch before the first step, and returns a module that is trained with it.

    Returns:
        ``(model, batch) -> loss``.

    Raises:
        UsageError: an unknown name (near names are listed).
    """
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise UsageError(f"unknown objective {objective!r}, known are {', '.join(OBJECTIVES)}{near(objective, OBJECTIVES)}")
        objective = OBJECTIVES[objective]
    loss = cross_entropy if objective is None else objective
    if _takes_model(loss):
        return loss

    def on_outputs(model: nn.Module, batch: Batch) -> Tensor:
        return loss(model(*batch.args, **batch.kwargs), batch.target)

    return on_outputs


def name_of(objective: str | Callable[..., Any] | None) -> str:
    """How an objective is called in logs."""
    if isinstance(objective, str):
        return objective
    if objective is None:
        return cross_entropy.__name__
    return str(getattr(objective, "__name__", type(objective).__name__))


def _takes_model(objective: Callable[..., Any]) -> bool:
    try:
        first = next(iter(inspect.signature(objective).parameters), None)
    except (TypeError, ValueError):  # built-ins without a signature take (outputs, target)
        return False
    return first == "model"
