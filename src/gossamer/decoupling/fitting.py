"""One convolution decoupled: what stands in for it, fitted to its inputs where their moments are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gossamer.calibration import Moments, shrunk
from gossamer.decoupling.fits import bottleneck, energies, explained, grouped, irreplaceable, laid_out, product_of_terms, separable
from gossamer.decoupling.forms import Sizes, check, convolutions, repeats, skeleton
from gossamer.decoupling.partition import assign, part
from gossamer.errors import UsageError
from gossamer.exchange import canonical, dims, put

Orders = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Fitted:
    """A decoupled convolution.

    Attributes:
        module: what stands in for it.
        inputs, outputs: of a grouped one, the channels in the order of its groups; empty where that is the order they have.
        shift: what the outputs' means would have lost, ``(outputs,)``; the last convolution's bias makes up for it. None without moments.
        error: relative error: root mean square of the outputs on the moments' data, means apart; without moments, norm of the weight.
        missing: what it lacks of the weight, ``(groups, outs, K)``.
    """

    module: nn.Sequential
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shift: Tensor | None
    error: float
    missing: Tensor = field(repr=False)


def decouple_layer(
    layer: _ConvNd,
    *,
    form: str = "depthwise_separable",
    sizes: Sizes = (1,),
    inputs: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    bias: bool | None = None,
    moments: Moments | None = None,
    seed: int = 0,
) -> nn.Sequential:
    """A convolution as depthwise-separable terms, as a grouped convolution between two orders of channels, or as a bottleneck.

    Examples:
        >>> decouple_layer(nn.Conv2d(8, 12, 3, stride=2, padding=1), sizes=(2,))
        Sequential(
          (0): ChannelRepeat(2 times)
          (1): Conv2d(16, 16, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=16, bias=False)
          (2): Conv2d(16, 12, kernel_size=(1, 1), stride=(1, 1))
        )

    Args:
        layer: any `torch.nn` convolution: 1-D to 3-D, transposed, of any stride, padding, dilation and groups. It stays as it is.
        form: ``"depthwise_separable"``, ``"grouped"`` or ``"bottleneck"``.
        sizes: terms, exact at the smaller of kernel positions and outputs of a group; groups; or inner inputs and outputs. Of each group.
        inputs, outputs: of a grouped one, the channels in the order of its groups; empty: the order they have; None: found, so that the groups
            hold as much of the weight, or with moments of the outputs, as can be.
        bias: whether the last convolution has one; default: where the layer has one, or moments ask for one.
        moments: of the layer's inputs: the outputs' error is minimised in place of the weight's (see `gossamer.calibration.second_moments`).
        seed: of the search for groups.

    Returns:
        The modules in a row, in the mode, dtype and device of the original.

    Raises:
        PlanError: the form or the sizes do not fit the layer.
        UsageError: the weight is not finite.

    Source: see `gossamer.decoupling.fits` and `gossamer.decoupling.partition`.
    """
    return fit_layer(layer, form, sizes, inputs=inputs, outputs=outputs, bias=bias, moments=moments, seed=seed).module


def fit_layer(
    layer: _ConvNd,
    form: str,
    sizes: Sizes,
    *,
    inputs: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    bias: bool | None = None,
    moments: Moments | None = None,
    seed: int = 0,
) -> Fitted:
    """`decouple_layer`, with how well it went."""
    check(layer, form, sizes, inputs or (), outputs or (), str(layer))
    w = canonical(layer).cpu().double()
    if not bool(torch.isfinite(w).all()):
        raise UsageError(f"the weight of {layer} holds values that are NaN or infinite: check how it was trained")
    c_GKK = shrunk(moments).cpu() if moments is not None else None
    found: Orders = (), ()
    groups, outs = w.shape[:2]
    if form == "depthwise_separable":
        terms = separable(w, sizes[0], c_GKK)
        parts = laid_out(*terms, w.shape[3:], repeated=repeats(form, dims(layer), sizes))
        made_GOK = product_of_terms(*terms).flatten(2)
    elif form == "bottleneck":
        parts = bottleneck(w, sizes, c_GKK)
        made_GOK = torch.einsum("gai,gbat,gob->goit", parts[0].flatten(2), parts[1].flatten(3), parts[2].flatten(2)).flatten(2)
    else:
        given = None if inputs is None and outputs is None else (tuple(inputs or ()), tuple(outputs or ()))
        tried = _orders(w, sizes[0], c_GKK, seed) if given is None else [given]
        fits = [(order, *_in_groups(w, sizes[0], order, c_GKK)) for order in dict.fromkeys(tried)]
        found, parts, made_GOK = min(fits, key=lambda f: _error(w.flatten(2), w.flatten(2) - f[2], moments))
    missing_GOK = w.flatten(2) - made_GOK
    shift = None
    if moments is not None:
        shift = (missing_GOK @ moments.mean.cpu().double()[:, :, None]).flatten()
    bias = bias if bias is not None else layer.bias is not None or shift is not None
    made = skeleton(layer, form, sizes, inputs=found[0], outputs=found[1], bias=bias)
    layers = convolutions(made)
    for module, weight in zip(layers, parts, strict=True):
        put(module, weight)
    if bias:
        start = torch.zeros(groups * outs, dtype=torch.float64)
        start = start if layer.bias is None else layer.bias.detach().cpu().double()
        start = start if shift is None else start + shift
        with torch.no_grad():
            layers[-1].bias.copy_(start[list(found[1])] if found[1] else start)  # type: ignore[union-attr]
    return Fitted(made, *found, shift, _error(w.flatten(2), missing_GOK, moments), missing_GOK.float())


def _in_groups(w: Tensor, blocks: int, order: Orders, c_GKK: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """The weight of a grouped convolution between two orders, and the dense one that it stands for, ``(groups, outs, K)``."""
    groups, outs, ins = w.shape[:3]
    at_GI, at_GO = _within(order[0], groups, ins), _within(order[1], groups, outs)
    parts = grouped(w, blocks, at_GI, at_GO, c_GKK)
    return parts, _spread(parts[0], w, at_GI, at_GO).flatten(2)


def _orders(w: Tensor, blocks: int, c_GKK: Tensor | None, seed: int) -> list[Orders]:
    """Orders of all inputs and outputs to choose from, group by group; an empty one where it is the order they have.

    With data, inputs are parted by what they do in three ways, and left as they are; outputs then go where the inputs tell most of them.
    """
    if c_GKK is None:
        return [_parted(energies(w), blocks, seed)]
    groups, outs, ins = w.shape[:3]
    found = [_parted(e, blocks, seed)[0] for e in (energies(w), energies(w, c_GKK), irreplaceable(w, c_GKK))]
    orders: list[Orders] = [((), ())]
    for inputs in dict.fromkeys([*found, ()]):
        told = explained(w, blocks, _within(inputs, groups, ins), c_GKK).numpy()
        by_group = [assign(told_OB)[0] for told_OB in told]
        outputs = [g * outs + int(o) for g, by in enumerate(by_group) for b in range(blocks) for o in np.flatnonzero(by == b)]
        orders.append((inputs, _unless_sorted(outputs)))
    return orders


def _parted(energy_GOI: Tensor, blocks: int, seed: int) -> Orders:
    """Orders of inputs and outputs by which the diagonal blocks hold most energy."""
    all_in, all_out = list[int](), list[int]()
    for g, energy_OI in enumerate(energy_GOI.numpy()):
        by_output, by_input = part(energy_OI, blocks, seed=seed)
        all_in += [g * energy_OI.shape[1] + i for i in by_input]
        all_out += [g * energy_OI.shape[0] + o for o in by_output]
    return _unless_sorted(all_in), _unless_sorted(all_out)


def _unless_sorted(order: list[int]) -> tuple[int, ...]:
    return () if order == sorted(order) else tuple(order)


def _within(order: Sequence[int], groups: int, n: int) -> Tensor:
    """An order of all channels as positions within each group, ``(groups, n)``."""
    return torch.tensor(order or range(groups * n)).reshape(groups, n) - n * torch.arange(groups)[:, None]


def _spread(weight: Tensor, w: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """A grouped weight as the dense one that it stands for, ``(groups, outs, ins, positions)``."""
    groups = len(w)
    blocks = len(weight) // groups
    out = torch.zeros_like(w.flatten(3))
    o, i = outputs.reshape(groups, blocks, -1), inputs.reshape(groups, blocks, -1)
    g = torch.arange(groups)[:, None, None, None]
    out[g, o[..., None], i[:, :, None]] = weight.reshape(groups, blocks, *weight.shape[1:3], -1)
    return out


def _error(w_GOK: Tensor, missing_GOK: Tensor, moments: Moments | None) -> float:
    """Relative error of the outputs, or, without moments or where the outputs do not vary, of the weight."""
    if moments is not None:
        c_GKK = moments.covariance().cpu().double()
        lost, whole = (float(((m @ c_GKK) * m).sum().clamp(min=0)) for m in (missing_GOK, w_GOK))
        if whole > 1e-30:
            return float((lost / whole) ** 0.5)
    whole = float(w_GOK.norm())
    return float(missing_GOK.norm()) / whole if whole > 0 else 0.0
