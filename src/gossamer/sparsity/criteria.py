"""How much a single weight matters: its magnitude, or what calibration data say about it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gossamer.errors import UsageError
from gossamer.profiling.runtime import evaluating
from gossamer.sources.batches import outputs, split

CRITERIA = ("magnitude", "taylor", "fisher", "snip", "wanda", "second_order")
"""Names of the criteria."""
GRADIENT = ("taylor", "fisher", "snip")
Batches = Iterable[Any]


def scores(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    criterion: str,
    *,
    calibration: Batches | None,
    example_inputs: Any,
    objective: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A score for every entry of every weight; higher is more important.

    ``"magnitude"`` is ``|w|``. With ``g`` the gradient of the loss on a batch: ``"taylor"`` is the mean of ``|g w|`` over batches (Molchanov et
    al., ICLR 2017), ``"snip"`` is ``|w|`` times the magnitude of the mean of ``g`` (Lee et al., ICLR 2019), ``"fisher"`` is ``w^2`` times the
    mean of ``g^2``, the diagonal of the empirical Fisher information over batches (LeCun et al., NeurIPS 1989). ``"wanda"`` is ``|w|`` times the
    root mean square of the input that it multiplies (Sun et al., ICLR 2024).

    Args:
        model: the network; not changed.
        weights: name -> parameter of it.
        criterion: one of `CRITERIA` but ``"second_order"``.
        calibration: batches; those of gradient criteria have labels, or the network's own predictions stand in for them.
        example_inputs: tells inputs from targets.
        objective: ``(outputs, target) -> loss``; default: cross-entropy.

    Returns:
        Scores by name, and one line for weights that got their magnitude instead, with the reason.

    Raises:
        UsageError: calibration data are needed and missing or empty.
    """
    if criterion == "magnitude":
        return {n: _magnitude(p) for n, p in weights.items()}, ()
    batches = needed(criterion, calibration)
    if criterion == "wanda":
        norms = _input_norms(model, weights, batches, example_inputs)
        plain = [n for n in weights if n not in norms]
        note = f"scored by magnitude, their inputs are not those of a linear layer or convolution: {', '.join(plain)}"
        return {n: _magnitude(p) * norms[n] if n in norms else _magnitude(p) for n, p in weights.items()}, (note,) if plain else ()
    found = _gradients(model, weights, criterion, batches, example_inputs, objective)
    unused = [n for n in weights if n not in found]
    note = f"no gradient reaches {', '.join(unused)}: scored 0"
    return {n: found.get(n, torch.zeros_like(_magnitude(p))) for n, p in weights.items()}, (note,) if unused else ()


def needed(criterion: str, calibration: Batches | None) -> Batches:
    """The calibration data; UsageError where a criterion needs them and there are none."""
    if calibration is None:
        raise UsageError(
            f"criterion={criterion!r} needs calibration data: give calibration=, batches of inputs, with targets if there are some"
        )
    return calibration


def _magnitude(p: Tensor) -> Tensor:
    a = p.detach().abs()
    return a if a.dtype in (torch.float32, torch.float64) else a.float()


def _gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    criterion: str,
    batches: Batches,
    example_inputs: Any,
    objective: Callable[[Tensor, Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    network = copy.deepcopy(model).eval().requires_grad_(True)
    mine = dict(network.named_parameters())
    sums: dict[str, Tensor] = {}
    count = 0
    with torch.enable_grad():
        for raw in batches:
            batch = split(raw, example_inputs)
            out = outputs(network(*batch.args, **batch.kwargs))[0]
            network.zero_grad()
            if objective is not None:
                objective(out, batch.target).backward()
            else:
                labels = isinstance(batch.target, Tensor) and not batch.target.is_floating_point()
                F.cross_entropy(out, batch.target if labels else out.detach().argmax(1)).backward()
            for name in weights:
                g = mine[name].grad
                if g is not None:
                    now = {"taylor": (g * mine[name].detach()).abs(), "fisher": g.square(), "snip": g}[criterion]
                    sums[name] = sums[name] + now if name in sums else now.clone()
            count += 1
    if not count:
        raise UsageError(f"criterion={criterion!r} got no calibration batch: the data is empty")
    match criterion:
        case "taylor":
            return {n: s / count for n, s in sums.items()}
        case "fisher":
            return {n: weights[n].detach().square() * s / count for n, s in sums.items()}
        case _:
            return {n: (weights[n].detach() * s / count).abs() for n, s in sums.items()}


def owners(model: nn.Module, weights: Iterable[str]) -> dict[str, nn.Linear | _ConvNd]:
    """The linear layer or (not transposed) convolution that each weight belongs to, where it is one."""
    out: dict[str, nn.Linear | _ConvNd] = {}
    for name in weights:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "weight" and isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd):
            out[name] = module
    return out


def _input_norms(model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Batches, example_inputs: Any) -> dict[str, Tensor]:
    """Root mean square of every input channel, shaped to multiply the weight."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []

    def watch(name: str, spatial: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().movedim(-1 - spatial, 0).flatten(1)
            sums[name] = sums.get(name, 0) + x.square().sum(1, dtype=torch.float64)
            counts[name] = counts.get(name, 0) + x.shape[1]

        return hook

    layers = owners(model, weights)
    for name, module in layers.items():
        spatial = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)
        handles.append(module.register_forward_pre_hook(watch(name, spatial)))
    try:
        seen = 0
        with evaluating(model):
            for raw in batches:
                batch = split(raw, example_inputs)
                model(*batch.args, **batch.kwargs)
                seen += 1
    finally:
        for h in handles:
            h.remove()
    if not seen:
        raise UsageError("criterion='wanda' got no calibration batch: the data is empty")
    out = {}
    for name, total in sums.items():
        w, module = weights[name], layers[name]
        rms = (total / counts[name]).sqrt().to(_magnitude(w).dtype)
        groups = getattr(module, "groups", 1)
        per_group = rms.reshape(groups, -1).repeat_interleave(w.shape[0] // groups, 0)
        out[name] = per_group.reshape(w.shape[0], w.shape[1], *(1,) * (w.dim() - 2))
    return out
