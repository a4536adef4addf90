"""Penalties on weights that make whole channels small while a network trains, so that pruning them costs less afterwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gossamer.errors import UsageError, near

PENALTIES = ("bn_l1", "group_lasso")
"""Names of the penalties."""


def bn_l1(model: nn.Module) -> Tensor:
    """Sum of the absolute scales of all batch norms (network slimming; Liu et al., ICCV 2017).

    Examples:
        >>> bn_l1(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(2))).item()
        5.0

    Args:
        model: the network.

    Returns:
        A scalar, with gradients.

    Raises:
        UsageError: it has no batch norm with a scale.
    """
    scales = [m.weight.abs().sum() for m in model.modules() if isinstance(m, _BatchNorm) and m.affine]
    if not scales:
        raise UsageError("penalty='bn_l1' needs batch norms with scales, of which the network has none: use 'group_lasso'")
    return torch.stack(scales).sum()


def group_lasso(model: nn.Module) -> Tensor:
    """Sum over all filters of ``sqrt(n) ||w||_2``, n elements in a filter (structured sparsity learning; Wen et al., NeurIPS 2016).

    A filter is what makes one output channel of a convolution or one output feature of a linear layer.

    Examples:
        >>> layer = nn.Linear(4, 2, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> group_lasso(layer).item()
        8.0

    Args:
        model: the network.

    Returns:
        A scalar, with gradients.

    Raises:
        UsageError: it has neither convolutions nor linear layers.
    """
    sums = []
    for m in model.modules():
        if isinstance(m, nn.Linear | _ConvNd):
            w = m.weight.movedim(1, 0) if isinstance(m, _ConvTransposeNd) else m.weight
            filters = w.flatten(1)
            sums.append((filters.square().sum(1) + 1e-16).sqrt().sum() * filters.shape[1] ** 0.5)
    if not sums:
        raise UsageError("penalty='group_lasso' needs convolutions or linear layers, of which the network has none")
    return torch.stack(sums).sum()


def as_penalty(penalty: str | Callable[[nn.Module], Tensor] | None, weight: float) -> Callable[[nn.Module], Tensor] | None:
    """A penalty by name, or the caller's own, times its weight; None for none."""
    if penalty is None:
        return None
    if weight <= 0:
        raise UsageError(f"penalty_weight={weight}: must be above 0")
    if callable(penalty):
        own = penalty
    elif penalty in PENALTIES:
        own = {"bn_l1": bn_l1, "group_lasso": group_lasso}[penalty]
    else:
        raise UsageError(f"penalty={penalty!r}: known are {', '.join(PENALTIES)}, or a callable{near(str(penalty), PENALTIES)}")
    return lambda model: weight * own(model)
