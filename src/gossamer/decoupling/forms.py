"""What stands in for a convolution: depthwise-separable terms, a grouped convolution between two orders of channels, a bottleneck.

Letters: G groups, O outputs and I inputs of a group, t kernel positions, K inputs times kernel positions, T terms, B groups within a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from gossamer.adapters import ChannelOrder, ChannelRepeat
from gossamer.errors import PlanError
from gossamer.exchange import Dims, Factor, dims, row, walk
from gossamer.plan import replace_module

FORMS = ("depthwise_separable", "grouped", "bottleneck")
WIDTHS = (0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Of bottlenecks under a budget."""
Sizes = tuple[int, ...]


def parts_of(form: str, d: Dims, sizes: Sizes) -> list[Factor]:
    """The convolutions of a form, in the order in which they run.

    Examples:
        >>> d = Dims(1, 64, 32, (3, 3))
        >>> [f.shape for f in parts_of("depthwise_separable", d, (2,))], [f.shape for f in parts_of("grouped", d, (4,))]
        ([(64, 1, 1, 3, 3), (1, 64, 64, 1, 1)], [(4, 16, 8, 3, 3)])
        >>> [f.shape for f in parts_of("bottleneck", d, (8, 16))]
        [(1, 8, 32, 1, 1), (1, 16, 8, 3, 3), (1, 64, 16, 1, 1)]

    Args:
        form: one of `FORMS`.
        d: of the convolution.
        sizes: terms; groups, within each group that there is; or inner inputs and outputs of each group.
    """
    axes, one = tuple(range(len(d.kernel))), (1,) * len(d.kernel)
    if form == "depthwise_separable":
        (terms,) = sizes
        each = 1 if repeats(form, d, sizes) else terms
        return [Factor(d.groups * d.ins * terms // each, each, 1, axes, d.kernel), Factor(d.groups, d.outs, d.ins * terms, (), one)]
    if form == "grouped":
        (groups,) = sizes
        return [Factor(d.groups * groups, d.outs // groups, d.ins // groups, axes, d.kernel)]
    a, b = sizes
    return [Factor(d.groups, a, d.ins, (), one), Factor(d.groups, b, a, axes, d.kernel), Factor(d.groups, d.outs, b, (), one)]


def repeats(form: str, d: Dims, sizes: Sizes) -> bool:
    """Whether inputs are repeated for each term, which runtimes compute faster than several outputs of an input; not within groups."""
    return form == "depthwise_separable" and d.groups == 1 and sizes[0] > 1


def unfit(form: str, d: Dims, sizes: Sizes) -> str | None:
    """Why a form of these sizes cannot stand in for a convolution; None where it can.

    Examples:
        >>> unfit("grouped", Dims(1, 64, 3, (3, 3)), (2,))
        '2 groups do not divide its channels'
    """
    if form == "grouped":
        return f"{sizes[0]} groups do not divide its channels" if sizes[0] < 2 or d.ins % sizes[0] or d.outs % sizes[0] else None
    if d.taps == 1:
        return "its kernel has one position"
    limits = (most_terms(d),) if form == "depthwise_separable" else (d.ins, d.outs)
    if any(not 1 <= s <= m for s, m in zip(sizes, limits, strict=True)):
        return f"it takes sizes from 1 to {' and '.join(map(str, limits))}"
    return None


def most_terms(d: Dims) -> int:
    """Terms at which depthwise-separable terms are exact for every weight."""
    return min(d.outs, d.taps)


def sizes_of(form: str, d: Dims) -> list[Sizes]:
    """Sizes that a budget chooses from, descending by cost; some may save nothing.

    Examples:
        >>> sizes_of("grouped", Dims(1, 12, 18, (3, 3))), sizes_of("depthwise_separable", Dims(1, 3, 18, (3, 3)))
        ([(2,), (3,), (6,)], [(3,), (2,), (1,)])
    """
    if form == "depthwise_separable":
        return [(t,) for t in range(most_terms(d), 0, -1)]
    if form == "bottleneck":
        return list(dict.fromkeys(inner(d, w) for w in WIDTHS))
    n = gcd(d.ins, d.outs)
    return [(k,) for k in range(2, n + 1) if n % k == 0]


def inner(d: Dims, width: float) -> Sizes:
    """Inner inputs and outputs of a bottleneck of some width, a fraction of the channels."""
    return max(1, round(width * d.ins)), max(1, round(width * d.outs))


def check(layer: nn.Module, form: str, sizes: Sizes, inputs: Sequence[int], outputs: Sequence[int], where: str) -> None:
    """PlanError where an edit does not fit a layer."""
    if not isinstance(layer, _ConvNd):
        raise PlanError(f"module {where!r} is a {type(layer).__name__}, not a convolution")
    if len(sizes) != (2 if form == "bottleneck" else 1):
        raise PlanError(f"{where}: {form} takes {2 if form == 'bottleneck' else 1} sizes, not {sizes}")
    d = dims(layer)
    reason = unfit(form, d, sizes)
    if reason:
        raise PlanError(f"{where} cannot become {form}{sizes}: {reason}")
    for order, n, ins in ((inputs, d.ins, True), (outputs, d.outs, False)):
        if order and (form != "grouped" or not _is_order(order, d.groups, n)):
            raise PlanError(f"{where}: the order of its {'inputs' if ins else 'outputs'} is no order of {n} channels in {d.groups} groups")


def _is_order(order: Sequence[int], groups: int, n: int) -> bool:
    return len(order) == groups * n and all(sorted(order[g * n : (g + 1) * n]) == list(range(g * n, (g + 1) * n)) for g in range(groups))


def skeleton(
    layer: _ConvNd, form: str, sizes: Sizes, *, inputs: Sequence[int] = (), outputs: Sequence[int] = (), bias: bool, device: Any = None
) -> nn.Sequential:
    """The modules that stand in for a convolution, weights zero, in its mode, dtype and (unless named) device.

    Examples:
        >>> skeleton(nn.Conv2d(4, 6, 3, stride=2), "grouped", (2,), inputs=(0, 2, 1, 3), bias=True)
        Sequential(
          (0): ChannelOrder(4 channels)
          (1): Conv2d(4, 6, kernel_size=(3, 3), stride=(2, 2), groups=2)
        )

    Args:
        layer: the convolution.
        form, sizes: as for `parts_of`.
        inputs, outputs: of a grouped one, the channels in the order of its groups; empty where that is the order they have.
        bias: whether the last convolution has one.
        device: of the modules.
    """
    d = dims(layer)
    made: list[nn.Module] = list(row(layer, parts_of(form, d, sizes), bias=bias, device=device))
    on = layer.weight.device if device is None else device
    if repeats(form, d, sizes):
        made.insert(0, ChannelRepeat(sizes[0], spatial=len(d.kernel)))
    if inputs:
        made.insert(0, ChannelOrder(inputs, spatial=len(d.kernel), device=on))
    if outputs:
        made.append(_back(outputs, len(d.kernel), on))
    return nn.Sequential(*made).train(layer.training)


def exchange(
    model: nn.Module, layer: nn.Module, made: nn.Sequential, *, norm: _BatchNorm | None = None, outputs: Sequence[int] = ()
) -> nn.Module:
    """Put what stands in for a convolution into a network, in place; the order back comes after the batch norm, where one is named.

    Args:
        model: the network.
        layer: the convolution in it.
        made: from `skeleton`.
        norm: takes exactly what the layer gives; its channels are put in the order of the groups.
        outputs: that order.
    """
    if norm is not None and outputs:
        *kept, back = made
        made = nn.Sequential(*kept).train(layer.training)
        index = torch.tensor(outputs, device=back.index.device)  # type: ignore[arg-type]
        with torch.no_grad():
            for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                if t is not None:
                    t.copy_(t[index])
        model = replace_module(model, norm, nn.Sequential(norm, back).train(norm.training))
    return replace_module(model, layer, made)


def _back(outputs: Sequence[int], spatial: int, device: Any) -> ChannelOrder:
    back = [0] * len(outputs)
    for at, channel in enumerate(outputs):
        back[channel] = at
    return ChannelOrder(back, spatial=spatial, device=device)


def convolutions(module: nn.Sequential) -> list[_ConvNd]:
    """The convolutions of a stand-in, without the orders."""
    return [m for m in module if isinstance(m, _ConvNd)]


def cost(layer: _ConvNd, form: str, sizes: Sizes, shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """MACs of calls on inputs of some shapes, and elements of the weights.

    Examples:
        >>> cost(nn.Conv2d(8, 8, 3, padding=1), "depthwise_separable", (1,), [(1, 8, 4, 4)])
        (2176, 136)
    """
    made = convolutions(skeleton(layer, form, sizes, bias=False, device="meta"))
    weights = [m.weight.numel() for m in made]
    macs = sum(w * uses for shape in shapes for w, (_, uses) in zip(weights, walk(made, _given(made[0], shape)), strict=True))
    return macs, sum(weights)


def _given(first: _ConvNd, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what the first convolution is given: channels may have been repeated."""
    at = len(shape) - len(first.kernel_size) - 1
    return (*shape[:at], first.in_channels, *shape[at + 1 :])
