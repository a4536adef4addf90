"""One layer factorised: factors of its weight, fitted to its inputs where their moments are known, in modules that compute the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gossamer.calibration import Moments, shrunk
from gossamer.errors import UsageError
from gossamer.exchange import Layer, canonical, dims, put
from gossamer.lowrank.cp import CPFit, cp
from gossamer.lowrank.decompositions import spatial_svd, svd, tucker2
from gossamer.lowrank.structure import Ranks, check_ranks, skeleton


@dataclass(frozen=True)
class Fitted:
    """A factorised layer.

    Attributes:
        module: its layers in a row.
        shift: what the outputs' means would have lost, ``(outputs,)``; the last layer's bias makes up for it. None without moments.
        error: relative error: root mean square of the outputs on the moments' data, means apart; without moments, norm of the weight.
        missing: what the factors lack of the weight, ``(groups, outs, K)``.
        cp: how the decomposition went, of a CP-factorised layer.
    """

    module: nn.Sequential
    shift: Tensor | None
    error: float
    missing: Tensor = field(repr=False)
    cp: CPFit | None = None


def factorize_layer(
    layer: Layer, *, method: str, ranks: Ranks, bias: bool | None = None, moments: Moments | None = None, seed: int = 0
) -> nn.Sequential:
    """A linear layer or convolution as a sequence of smaller ones; at full rank it computes the same.

    Examples:
        >>> conv = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        >>> factorize_layer(conv, method="tucker2", ranks=(4, 6))
        Sequential(
          (0): Conv2d(8, 4, kernel_size=(1, 1), stride=(1, 1), bias=False)
          (1): Conv2d(4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)
          (2): Conv2d(6, 12, kernel_size=(1, 1), stride=(1, 1))
        )

    Args:
        layer: any `torch.nn` linear layer or convolution: 1-D to 3-D, transposed, of any stride, padding, dilation and groups. It stays as it is.
        method: ``"svd"``, ``"spatial_svd"`` (two kernel axes longer than 1), ``"tucker2"`` or ``"cp"`` (one).
        ranks: of each group, from 1 to `full_ranks`; two for Tucker-2.
        bias: whether the last layer has one; default: where the layer has one, or moments ask for one.
        moments: of the layer's inputs: the outputs' error is minimised in place of the weight's (see `gossamer.calibration.second_moments`).
        seed: of CP's start.

    Returns:
        The layers, in the mode, dtype and device of the original.

    Raises:
        PlanError: the method or the ranks do not fit the layer.
        UsageError: the weight is not finite.
    """
    return fit_layer(layer, method, ranks, bias=bias, moments=moments, seed=seed).module


def fit_layer(
    layer: Layer,
    method: str,
    ranks: Ranks,
    *,
    bias: bool | None = None,
    moments: Moments | None = None,
    c_GKK: Tensor | None = None,
    seed: int = 0,
) -> Fitted:
    """`factorize_layer`, with how well it went; ``c_GKK`` is what `shrunk` makes of the moments, where that is known already."""
    check_ranks(method, dims(layer), ranks, str(layer))
    w = canonical(layer).cpu().double()
    if not bool(torch.isfinite(w).all()):
        raise UsageError(f"the weight of {layer} holds values that are NaN or infinite: check how it was trained")
    if moments is not None and c_GKK is None:
        c_GKK = shrunk(moments).cpu()
    found: CPFit | None = None
    if method == "svd":
        parts = svd(w, ranks[0], c_GKK)
    elif method == "spatial_svd":
        parts = spatial_svd(w, ranks[0], c_GKK)
    elif method == "tucker2":
        parts = tucker2(w, ranks, c_GKK)
    else:
        parts, found = cp(w, ranks[0], c_GKK, seed=seed)
    missing_GOK = (w - product(method, parts).reshape(w.shape)).flatten(2)
    shift = None
    if moments is not None:
        shift = (missing_GOK @ moments.mean.cpu().double()[:, :, None]).flatten()
    bias = bias if bias is not None else layer.bias is not None or shift is not None
    made = skeleton(layer, method, ranks, bias=bias)
    for module, part in zip(made, parts, strict=True):
        put(module, part)  # type: ignore[arg-type]
    if bias:
        start = torch.zeros(missing_GOK.shape[0] * missing_GOK.shape[1], dtype=torch.float64)
        start = start if layer.bias is None else layer.bias.detach().cpu().double()
        with torch.no_grad():
            made[-1].bias.copy_(start if shift is None else start + shift)  # type: ignore[operator]
    return Fitted(made, shift, _error(w.flatten(2), missing_GOK, moments), missing_GOK.float(), found)


def product(method: str, parts: list[Tensor]) -> Tensor:
    """The weight that factors stand for, ``(groups, outs, ins, kernel positions)``."""
    first, last = parts[0], parts[-1]
    groups, outs, ins = len(first), last.shape[1], first.shape[2]
    if method == "svd":
        return torch.einsum("grit,gor->goit", first.reshape(groups, -1, ins, first[0, 0, 0].numel()), last.flatten(2))
    if method == "spatial_svd":
        return torch.einsum("gria,gorb->goiab", first.flatten(3), last.flatten(3)).flatten(3)
    if method == "tucker2":
        return torch.einsum("gai,gbat,gob->goit", first.flatten(2), parts[1].flatten(3), last.flatten(2))
    rank = first.shape[1]
    taps = torch.ones(groups, rank, 1, dtype=first.dtype)
    for f in parts[1:-1]:
        taps = (taps[:, :, :, None] * f.reshape(groups, rank, 1, -1)).flatten(2)
    return torch.einsum("gri,grt,gor->goit", first.flatten(2), taps, last.flatten(2)).reshape(groups, outs, ins, -1)


def _error(w_GOK: Tensor, missing_GOK: Tensor, moments: Moments | None) -> float:
    """Relative error of the outputs, or, without moments or where the outputs do not vary, of the weight."""
    if moments is not None:
        c_GKK = moments.covariance().cpu()
        lost, whole = (float(((m @ c_GKK) * m).sum().clamp(min=0)) for m in (missing_GOK.float(), w_GOK.float()))
        if whole > 1e-30:
            return float((lost / whole) ** 0.5)
    whole = float(w_GOK.norm())
    return float(missing_GOK.norm()) / whole if whole > 0 else 0.0
