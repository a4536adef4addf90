"""Compensation: what the removed channels carried is predicted from those that stay, and folded into the layers that consume them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gossamer.adapters import free_attention
from gossamer.calibration import Batches, JointMoments, following_norms
from gossamer.plan import AddBias
from gossamer.profiling.runtime import evaluating
from gossamer.sources.batches import Batch

RIDGE = 0.1
"""Regularisation, as a fraction of the mean variance of the channels that stay."""
STAGES = 24
"""Sweeps at most: consumers are fitted in this many groups, in execution order, each on what the groups before it made of the network."""
ROWS = 8192
"""Most positions of a batch that a layer is fitted on, drawn with a fixed seed."""


class _Enough(Exception):
    """Raised by a hook once the last consumer of a stage was reached: what comes after it does not matter."""


def predict(moments: JointMoments, keep: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression of the original's channels on the pruned network's: ``x ~ A y + b``.

    The penalty pulls ``A`` towards plain removal, not towards zero: ``A = S + (C_xy - S C_yy)(C_yy + lambda I)^-1``, S the selection.

    Args:
        moments: of the pruned network's channels at the consumer, and of the original's with them.
        keep: bool, which of the original's channels are left.
        ridge: lambda as a fraction of the mean variance.

    Returns:
        ``A`` of shape ``(original, left)`` and ``b`` of shape ``(original,)``, float64.
    """
    found = moments.inputs.mean, moments.mean, moments.inputs.scatter / moments.inputs.n, moments.products / moments.inputs.n
    mean_y, mean_x, c_yy, c_xy = (t[0].double().cpu() for t in found)
    select = torch.eye(len(keep), dtype=torch.float64)[:, keep]
    penalty = max(ridge * float(c_yy.diagonal().mean()), 1e-12) * torch.eye(len(mean_y), dtype=torch.float64)
    a = select + torch.linalg.solve(c_yy + penalty, (c_xy - select @ c_yy).T).T
    return a, mean_x - a @ mean_y


def compensate(
    original: nn.Module,
    pruned: nn.Module,
    masks: Mapping[tuple[str, int], Tensor],
    batches: Iterable[Any],
    example_inputs: Any,
    *,
    ridge: float = RIDGE,
    stages: int = STAGES,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[AddBias], tuple[str, ...]]:
    """Fit every layer that lost inputs to what the original's layer gave, in place.

    Layers are fitted in execution order, on what the layers before them, already fitted, give. The shift goes into the layer's bias; into the
    running mean of a batch norm that follows directly; else the layer gets a bias.

    Args:
        original: the source network.
        pruned: its cut copy, changed in place.
        masks: from `ChannelMap.keep_masks`.
        batches: calibration batches, swept over once a stage.
        example_inputs: tells inputs from targets.
        ridge: regularisation.
        stages: most sweeps over the batches.
        progress: called with stages done and all.

    Returns:
        The biases that were added, as edits, and one line for each thing that was left alone.
    """
    with free_attention(original):  # so that the layers inside an attention are called as layers
        return _compensate(original, pruned, masks, Batches(batches, example_inputs, original), ridge, stages, progress)


def _compensate(
    original: nn.Module,
    pruned: nn.Module,
    masks: Mapping[tuple[str, int], Tensor],
    batches: Iterable[Batch],
    ridge: float,
    stages: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[AddBias], tuple[str, ...]]:
    calls, notes = _consumers(original, masks, batches)
    consumers = list(dict.fromkeys(calls))
    norms = following_norms(pruned, consumers, batches)
    groups = [consumers[i * len(consumers) // stages : (i + 1) * len(consumers) // stages] for i in range(stages)]
    groups = [g for g in groups if g]
    edits: list[AddBias] = []
    for done, group in enumerate(groups):
        moments = _measure(original, pruned, masks, group, calls.count(group[-1]) == 1, batches)
        for name in group:
            if name in moments:
                edits += _fold(original, pruned, name, masks, moments[name], ridge, norms.get(name))
        if progress is not None:
            progress(done + 1, len(groups))
    return edits, notes


def _axis(module: nn.Module) -> int | None:
    """Input dimension of a consumer's weight; None where it cannot be compensated."""
    if isinstance(module, nn.Linear):
        return 1
    if isinstance(module, _ConvNd) and module.groups == 1:
        return 0 if isinstance(module, _ConvTransposeNd) else 1
    return None


def _consumers(original: nn.Module, masks: Mapping[tuple[str, int], Tensor], batches: Iterable[Batch]) -> tuple[list[str], tuple[str, ...]]:
    """Names of the layers that lost inputs, one for each call, in execution order."""
    modules = dict(original.named_modules())
    wanted = []
    skipped = []
    for (tensor, dim), mask in masks.items():
        path, _, leaf = tensor.rpartition(".")
        module = modules.get(path)
        if leaf == "in_proj_weight" and dim == 1:
            skipped.append(f"input projection of {path}")
        if leaf != "weight" or module is None or not isinstance(module, nn.Linear | _ConvNd):
            continue
        if _axis(module) == dim and mask.dim() == 1:
            wanted.append(path)
        elif mask.dim() == 2 and isinstance(module, _ConvNd):
            skipped.append(f"grouped convolution {path}")
    order: list[str] = []
    handles = [modules[n].register_forward_hook(lambda *_, n=n: order.append(n)) for n in wanted]
    _once(original, batches)
    for h in handles:
        h.remove()
    note = (f"not compensated: {', '.join(skipped[:3])}{f' and {len(skipped) - 3} more' if len(skipped) > 3 else ''}",) if skipped else ()
    return order, note


def _once(model: nn.Module, batches: Iterable[Batch]) -> None:
    for batch in batches:
        with evaluating(model):
            model(*batch.args, **batch.kwargs)
        return


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """A consumer's input as ``(samples, channels)``."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    spatial = len(module.kernel_size)  # type: ignore[arg-type]
    return x.movedim(x.dim() - spatial - 1, -1).reshape(-1, x.shape[-spatial - 1])


def _moments(x_NI: Tensor, y_NK: Tensor) -> JointMoments:
    """Of a consumer's input in the original network and in the pruned one."""
    if len(x_NI) > ROWS:  # positions of a picture say much the same
        drawn = torch.randint(len(x_NI), (ROWS,), generator=torch.Generator().manual_seed(0)).to(x_NI.device)
        x_NI, y_NK = x_NI[drawn], y_NK[drawn]
    return JointMoments.of(y_NK.T[None], x_NI.T[None])


def _measure(
    original: nn.Module,
    pruned: nn.Module,
    masks: Mapping[tuple[str, int], Tensor],
    group: Sequence[str],
    stop_early: bool,
    batches: Iterable[Batch],
) -> dict[str, JointMoments]:
    """Moments of the inputs of ``group``, both networks run on the same batches, up to its last layer where that is called once."""
    ours, theirs = dict(pruned.named_modules()), dict(original.named_modules())
    moments: dict[str, JointMoments] = {}
    caught: dict[tuple[str, str], list[Tensor]] = {}

    def catch(which: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            caught.setdefault((which, name), []).append(_rows(module, inputs[0].detach()))

        return hook

    def stop(*_: Any) -> None:
        raise _Enough

    handles = []
    for which, modules in (("x", theirs), ("y", ours)):
        handles += [modules[n].register_forward_pre_hook(catch(which, n)) for n in group]
    last = group[-1]
    if stop_early:
        handles += [modules[last].register_forward_pre_hook(stop) for modules in (theirs, ours)]
    try:
        for batch in batches:
            for network in (original, pruned):
                with evaluating(network):
                    try:
                        network(*batch.args, **batch.kwargs)
                    except _Enough:
                        continue
            for name in group:
                for x, y in zip(caught.pop(("x", name), []), caught.pop(("y", name), []), strict=True):
                    new = _moments(x, y)
                    moments[name] = moments[name] + new if name in moments else new
    finally:
        for h in handles:
            h.remove()
    return moments


def _fold(
    original: nn.Module,
    pruned: nn.Module,
    name: str,
    masks: Mapping[tuple[str, int], Tensor],
    moments: JointMoments,
    ridge: float,
    norm: _BatchNorm | None,
) -> list[AddBias]:
    """Put the prediction into a consumer's weight and bias."""
    old, new = original.get_submodule(name), pruned.get_submodule(name)
    axis = _axis(old)
    assert axis is not None
    a_IK, b_I = predict(moments, masks[f"{name}.weight", axis].cpu(), ridge)
    assert isinstance(old.weight, Tensor)
    assert isinstance(new.weight, Tensor)
    w_OI = old.weight.detach().double().cpu().movedim(axis, -1)  # (out, ..., in)
    kept_out = masks.get((f"{name}.weight", 1 - axis))
    if kept_out is not None:
        w_OI = w_OI[kept_out.cpu()]
    shift_O = (w_OI @ b_I).flatten(1).sum(1) if w_OI.dim() > 2 else w_OI @ b_I
    with torch.no_grad():
        new.weight.copy_((w_OI @ a_IK).movedim(-1, axis))
        if isinstance(new.bias, Tensor):
            new.bias += shift_O.to(new.bias)
        elif norm is not None:
            assert norm.running_mean is not None
            norm.running_mean -= shift_O.to(norm.running_mean)
        elif bool(shift_O.abs().max() > 0):
            new.bias = nn.Parameter(shift_O.to(new.weight))
            return [AddBias(module=name, size=len(shift_O))]
    return []
