"""How much each class of channels matters: magnitude, batch-norm scale, gradients, distances, activations, random, or the caller's own measure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from gossamer.errors import UsageError, near
from gossamer.profiling.runtime import evaluating
from gossamer.sources.batches import outputs, split
from gossamer.trace.channels import ChannelMap

Importance = str | Callable[[nn.Module, ChannelMap], Tensor]
"""A criterion by name, or a callable ``(model, channels) -> scores`` of shape ``(num_classes,)``."""

CRITERIA = ("l1", "l2", "bn_scale", "taylor", "fisher", "fpgm", "activation", "random")
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

    All criteria look at whole classes, over every slice that a class has in the weights that produce and consume it:

    - ``"l1"``, ``"l2"``: the norm of those slices (Li et al., ICLR 2017).
    - ``"bn_scale"``: the absolute scales of its batch norms (Liu et al., ICCV 2017); the l2 norm in families without any.
    - ``"taylor"``: the square of ``sum(w * dL/dw)``, averaged over batches (Molchanov et al., CVPR 2019).
    - ``"fisher"``: ``sum(w^2 (dL/dw)^2)``, averaged over batches (the diagonal of the empirical Fisher information; Theis et al., 2018).
    - ``"fpgm"``: the sum of distances of its filters to the others of its family: those nearest the geometric median can be replaced by
      the rest (He et al., CVPR 2019).
    - ``"activation"``: the mean absolute value of what it hands to the layers that consume it.
    - ``"random"``: drawn uniformly.

    Each family is divided by its mean, so that layers of different scale compete fairly.

    Args:
        model: the network.
        channels: its channel map.
        criterion: one of the names above, or a callable, whose scores are taken as they are.
        example_inputs: tells inputs from targets in calibration batches.
        calibration: batches, needed by ``"taylor"``, ``"fisher"`` and ``"activation"``. The loss is cross-entropy against the targets, or,
            where a batch holds none, against the network's own most likely classes.
        seed: of ``"random"``.

    Returns:
        float64 scores, shape ``(num_classes,)``; larger matters more.

    Raises:
        UsageError: an unknown criterion, no calibration data where they are needed, no batch norm for ``"bn_scale"``, or a callable's scores of
            the wrong shape or not finite.
    """
    if callable(criterion):
        scores = torch.as_tensor(criterion(model, channels), dtype=torch.float64).cpu()
        if scores.shape != (channels.num_classes,) or not bool(torch.isfinite(scores).all()):
            raise UsageError(f"the importance callable must return {channels.num_classes} finite scores, not shape {tuple(scores.shape)}")
        return scores
    state = {n: t.detach() for n, t in model.state_dict().items()}
    match criterion:
        case "l1":
            scores = class_sums(channels, state, torch.abs)
        case "l2":
            scores = class_sums(channels, state, torch.square).sqrt()
        case "bn_scale":
            scores = _bn_scales(model, channels, state)
        case "taylor":
            scores = _from_gradients(model, channels, criterion, example_inputs, calibration, lambda product: product, squared=True)
        case "fisher":
            scores = _from_gradients(model, channels, criterion, example_inputs, calibration, torch.square, squared=False)
        case "fpgm":
            scores = _distances(channels, state)
        case "activation":
            scores = _activations(model, channels, example_inputs, calibration)
        case "random":
            scores = torch.rand(channels.num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        case _:
            raise UsageError(f"importance={criterion!r}: known are {', '.join(CRITERIA)}, or a callable{near(str(criterion), CRITERIA)}")
    return per_family(channels, scores)


def class_sums(channels: ChannelMap, values: Mapping[str, Tensor], change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Sum element values over every producing and consuming slice of each class.

    Args:
        channels: the channel map.
        values: state-dict name -> value of each element; tensors that are absent, or hold whole numbers, count nothing.
        change: of the values, one tensor at a time, so that no copy of all of them is held; sums are taken in double precision.

    Returns:
        float64, shape ``(num_classes,)``.
    """
    scores = torch.zeros(channels.num_classes, dtype=torch.float64)
    name, changed = "", scores
    for axis in channels.axes:
        raw = values.get(axis.tensor)
        if raw is None or axis.role == "pointwise" or not raw.is_floating_point():
            continue
        labels = axis.labels.cpu()
        if axis.tensor != name:
            name, changed = axis.tensor, raw.cpu() if raw.dtype == torch.float64 else raw.float().cpu()
            changed = changed if change is None else change(changed)
        v = changed
        if labels.dim() == 2:
            v = v.unflatten(0, (labels.shape[0], -1)).movedim(axis.dim + 1, 1)
            sums = v.flatten(2).sum(2, dtype=torch.float64).reshape(-1)
        else:
            sums = v.movedim(axis.dim, 0).flatten(1).sum(1, dtype=torch.float64)
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


def _bn_scales(model: nn.Module, channels: ChannelMap, state: Mapping[str, Tensor]) -> Tensor:
    norms = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.affine}
    scales = torch.zeros(channels.num_classes, dtype=torch.float64)
    found = torch.zeros(channels.num_classes, dtype=torch.bool)
    for axis in channels.axes:
        if axis.tensor in norms and axis.labels.dim() == 1:
            inside = axis.labels >= 0
            scales.index_add_(0, axis.labels[inside], state[axis.tensor].double().cpu().abs()[inside])
            found[axis.labels[inside]] = True
    if not bool(found.any()):
        raise UsageError("importance='bn_scale' needs batch norms, of which the network has none on channels that can go: use 'l2'")
    others = class_sums(channels, state, torch.square).sqrt()
    return torch.where(found, scales, others)


def _distances(channels: ChannelMap, state: Mapping[str, Tensor]) -> Tensor:
    """Sum of the distances of each class's filters to those of the other classes of its family."""
    scores = torch.zeros(channels.num_classes, dtype=torch.float64)
    produced = [a for a in channels.axes if a.role == "out" and a.labels.dim() == 1]
    for group in channels.groups:
        place = torch.full((channels.num_classes + 1,), -1, dtype=torch.long)
        place[group.classes] = torch.arange(len(group.classes))
        squared = torch.zeros(len(group.classes), len(group.classes), dtype=torch.float64)
        for axis in produced:
            at = place[axis.labels]
            rows = state[axis.tensor].double().cpu().movedim(axis.dim, 0).flatten(1)[at >= 0]
            at = at[at >= 0]
            if len(at) and len(at) % len(group.classes) == 0:
                filters = rows[torch.argsort(at, stable=True)].reshape(len(group.classes), -1)
                squared += torch.cdist(filters, filters).square()
        scores[group.classes] = squared.sqrt().sum(1)
    return scores


def _activations(model: nn.Module, channels: ChannelMap, example_inputs: Any, calibration: Iterable[Any] | None) -> Tensor:
    """Mean absolute value of every channel that a linear layer or convolution consumes; the family's mean where none is seen."""
    sums, counts = torch.zeros(channels.num_classes, dtype=torch.float64), torch.zeros(channels.num_classes, dtype=torch.float64)
    modules = dict(model.named_modules())
    handles = []

    def watch(labels: Tensor, dim: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().abs()
            mean = x.movedim(dim if dim >= 0 else x.dim() + dim, 0).flatten(1).double().mean(1).cpu()
            if len(mean) == len(labels):
                sums.index_add_(0, labels[labels >= 0], mean[labels >= 0])
                counts.index_add_(0, labels[labels >= 0], torch.ones_like(mean)[labels >= 0])

        return hook

    for axis in channels.axes:
        path, _, leaf = axis.tensor.rpartition(".")
        module = modules.get(path)
        if axis.role == "in" and leaf == "weight" and isinstance(module, nn.Linear | _ConvNd):
            dim = -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)
            handles.append(module.register_forward_pre_hook(watch(axis.labels.reshape(-1), dim)))
    try:
        _run_calibration(model, "activation", example_inputs, calibration)
    finally:
        for h in handles:
            h.remove()
    means = sums / counts.clamp(min=1)
    for group in channels.groups:
        seen = counts[group.classes] > 0
        if bool(seen.any()):
            means[group.classes] = torch.where(seen, means[group.classes], means[group.classes][seen].mean())
        else:
            means[group.classes] = 1.0
    return means


def _run_calibration(model: nn.Module, criterion: str, example_inputs: Any, calibration: Iterable[Any] | None) -> None:
    count = 0
    with evaluating(model):
        for raw in _needed(criterion, calibration):
            batch = split(raw, example_inputs)
            model(*batch.args, **batch.kwargs)
            count += 1
    if not count:
        raise UsageError(f"importance={criterion!r} got no calibration batch: the data is empty")


def _needed(criterion: str, calibration: Iterable[Any] | None) -> Iterable[Any]:
    if calibration is None:
        raise UsageError(
            f"importance={criterion!r} needs calibration data: give calibration=, batches of inputs, with targets where there are some"
        )
    return calibration


def _from_gradients(
    model: nn.Module,
    channels: ChannelMap,
    criterion: str,
    example_inputs: Any,
    calibration: Iterable[Any] | None,
    change: Callable[[Tensor], Tensor],
    *,
    squared: bool,
) -> Tensor:
    """Class sums of ``change(w * dL/dw)``, squared or not, averaged over batches."""
    batches = _needed(criterion, calibration)
    network = copy.deepcopy(model).eval().requires_grad_(True)
    parameters = dict(network.named_parameters())
    scores, count = torch.zeros(channels.num_classes, dtype=torch.float64), 0
    with torch.enable_grad():
        for raw in batches:
            batch = split(raw, example_inputs)
            logits = outputs(network(*batch.args, **batch.kwargs))[0]
            target = (
                batch.target if isinstance(batch.target, Tensor) and not batch.target.is_floating_point() else logits.detach().argmax(1)
            )
            network.zero_grad()
            F.cross_entropy(logits, target).backward()
            sums = class_sums(channels, {n: change(p.detach() * p.grad) for n, p in parameters.items() if p.grad is not None})
            scores += sums.square() if squared else sums
            count += 1
    if count == 0:
        raise UsageError(f"importance={criterion!r} got no calibration batch: the data is empty")
    return scores / count
