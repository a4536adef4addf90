"""How much each class of channels matters: magnitude, first-order Taylor, random, or the caller's own measure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.errors import UsageError, near
from gossamer.sources.batches import outputs, split
from gossamer.trace.channels import ChannelMap

Importance = str | Callable[[nn.Module, ChannelMap], Tensor]
"""A criterion by name, or a callable ``(model, channels) -> scores`` of shape ``(num_classes,)``."""

CRITERIA = ("l1", "l2", "taylor", "random")
"""Names of the criteria."""


def importance_scores(
    model: nn.Module,
    channels: ChannelMap,
    criterion: Importance,
    *,
    example_inputs: Any,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
) -> Tensor:
    """Importance of every class, comparable across families.

    Magnitude sums ``|w|`` or ``w^2`` over every slice that a class has in the weights that produce and consume it; Taylor takes the
    square of ``sum(w * dL/dw)`` over the same slices (Molchanov et al., CVPR 2019), averaged over batches. Each family is divided by its
    mean, so that layers of different scale compete fairly.

    Args:
        model: the network.
        channels: its channel map.
        criterion: ``"l1"``, ``"l2"``, ``"taylor"``, ``"random"``, or a callable, whose scores are taken as they are.
        example_inputs: tells inputs from targets in calibration batches.
        calibration: batches, needed by ``"taylor"``. The loss is cross-entropy against the targets, or, where a batch holds none, against
            the network's own most likely classes.
        seed: of ``"random"``.

    Returns:
        float64 scores, shape ``(num_classes,)``; larger matters more.

    Raises:
        UsageError: an unknown criterion, no calibration data for ``"taylor"``, or scores of the wrong shape or not finite.
    """
    if callable(criterion):
        scores = torch.as_tensor(criterion(model, channels), dtype=torch.float64).cpu()
        if scores.shape != (channels.num_classes,) or not bool(torch.isfinite(scores).all()):
            raise UsageError(f"the importance callable must return {channels.num_classes} finite scores, not shape {tuple(scores.shape)}")
        return scores
    state = {n: t.detach() for n, t in model.state_dict().items()}
    match criterion:
        case "l1":
            scores = class_sums(channels, {n: t.abs() for n, t in state.items() if t.is_floating_point()})
        case "l2":
            scores = class_sums(channels, {n: t.double().square() for n, t in state.items() if t.is_floating_point()}).sqrt()
        case "taylor":
            scores = _taylor(model, channels, example_inputs, calibration)
        case "random":
            scores = torch.rand(channels.num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        case _:
            raise UsageError(f"importance={criterion!r}: known are {', '.join(CRITERIA)}, or a callable{near(str(criterion), CRITERIA)}")
    return per_family(channels, scores)


def class_sums(channels: ChannelMap, values: Mapping[str, Tensor]) -> Tensor:
    """Sum element values over every producing and consuming slice of each class.

    Args:
        channels: the channel map.
        values: state-dict name -> value of each element; tensors that are absent count nothing.

    Returns:
        float64, shape ``(num_classes,)``.
    """
    scores = torch.zeros(channels.num_classes, dtype=torch.float64)
    for axis in channels.axes:
        v = values.get(axis.tensor)
        if v is None or axis.role == "pointwise":
            continue
        labels = axis.labels.cpu()
        v = v.double().cpu()
        if labels.dim() == 2:
            v = v.unflatten(0, (labels.shape[0], -1)).movedim(axis.dim + 1, 1)
            sums = v.flatten(2).sum(2).reshape(-1)
        else:
            sums = v.movedim(axis.dim, 0).flatten(1).sum(1)
        flat = labels.reshape(-1)
        scores.index_add_(0, flat[flat >= 0], sums[flat >= 0])
    return scores


def per_family(channels: ChannelMap, scores: Tensor) -> Tensor:
    """Scores divided by the mean of their family; a family of zeros stays zero."""
    scores = scores.clone()
    for group in channels.groups:
        mean = scores[group.classes].mean()
        if mean > 0:
            scores[group.classes] /= mean
    return scores


def _taylor(model: nn.Module, channels: ChannelMap, example_inputs: Any, calibration: Iterable[Any] | None) -> Tensor:
    if calibration is None:
        raise UsageError(
            "importance='taylor' needs calibration data: give calibration=, batches of inputs, with targets where there are some"
        )
    network = copy.deepcopy(model).eval().requires_grad_(True)
    parameters = dict(network.named_parameters())
    scores, count = torch.zeros(channels.num_classes, dtype=torch.float64), 0
    with torch.enable_grad():
        for raw in calibration:
            batch = split(raw, example_inputs)
            logits = outputs(network(*batch.args, **batch.kwargs))[0]
            target = (
                batch.target if isinstance(batch.target, Tensor) and not batch.target.is_floating_point() else logits.detach().argmax(1)
            )
            network.zero_grad()
            F.cross_entropy(logits, target).backward()
            products = {n: p.detach() * p.grad for n, p in parameters.items() if p.grad is not None}
            scores += class_sums(channels, products).square()
            count += 1
    if count == 0:
        raise UsageError("importance='taylor' got no calibration batch: the data is empty")
    return scores / count
