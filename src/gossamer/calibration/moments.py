"""First and second moments of what layers are computed from, over calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gossamer.calibration.patches import patches
from gossamer.errors import UsageError
from gossamer.profiling.runtime import evaluating
from gossamer.sources.batches import Batch

SHRINKAGE = 0.2
HELD_BYTES = 2**29
"""Second moments held at a time; layers beyond them wait for the next sweep over the batches."""


@dataclass
class Moments:
    """Sums over the positions of a layer's input, for each group.

    Attributes:
        n: positions.
        x: their sum, ``(groups, K)``.
        xx: sum of their outer products, ``(groups, K, K)``.
    """

    n: int
    x: Tensor
    xx: Tensor

    def mean(self) -> Tensor:
        """``(groups, K)``."""
        return self.x / self.n

    def covariance(self) -> Tensor:
        """``(groups, K, K)``."""
        mean_GK = self.mean()
        return self.xx / self.n - mean_GK[:, :, None] * mean_GK[:, None]


def shrunk(moments: Moments) -> Tensor:
    """Covariance of a layer's inputs, shrunk to 0.8 C + 0.2 mean(diag C) I, since few positions overfit.

    ``(groups, K, K)``, float64, positive definite; inputs that never change count alike. Source: Ledoit and Wolf, 2004.
    """
    c_GKK = moments.covariance().double()
    average_G1 = c_GKK.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    silent_G1 = average_G1 <= 1e-20
    diagonal_GK = torch.where(silent_G1, 1.0, SHRINKAGE * average_G1).expand(c_GKK.shape[:2])
    return torch.where(silent_G1[:, :, None], 0.0, (1 - SHRINKAGE) * c_GKK) + torch.diag_embed(diagonal_GK)


def second_moments(model: nn.Module, layers: Mapping[str, nn.Linear | _ConvNd], batches: Iterable[Batch]) -> dict[str, Moments]:
    """Moments of the inputs of some layers, in eval mode; layers that never run are left out.

    Args:
        model: the network, which stays as it is.
        layers: modules of it, by name.
        batches: taken apart, swept over once.

    Raises:
        UsageError: the batches are empty, or a layer's input is not finite.
    """
    return _sweep(model, layers, batches, 1)[0]


def moments_of_halves(model: nn.Module, layers: Mapping[str, nn.Linear | _ConvNd], batches: Iterable[Batch]) -> list[dict[str, Moments]]:
    """`second_moments` over the batches with even numbers, counted from zero, and over those with odd ones, which may be none."""
    return _sweep(model, layers, batches, 2)


def _sweep(model: nn.Module, layers: Mapping[str, nn.Linear | _ConvNd], batches: Iterable[Batch], parts: int) -> list[dict[str, Moments]]:
    every: list[dict[str, Moments]] = [{} for _ in range(parts)]
    count = 0

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Any, ...]) -> None:
            x_PGK = patches(module, inputs[0].detach())
            xx = (x_PGK[:, 0].T @ x_PGK[:, 0])[None] if x_PGK.shape[1] == 1 else x_PGK.permute(1, 2, 0) @ x_PGK.transpose(0, 1)
            found = every[count % parts]
            m = found.get(name)
            if m is None:
                found[name] = Moments(len(x_PGK), x_PGK.sum(0), xx)
            else:
                m.n, m.x, m.xx = m.n + len(x_PGK), m.x + x_PGK.sum(0), m.xx.add_(xx)

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    try:
        with evaluating(model):
            for batch in batches:
                model(*batch.args, **batch.kwargs)
                count += 1
    finally:
        for h in handles:
            h.remove()
    if not count:
        raise UsageError("no calibration batch: the data is empty")
    for name, m in ((n, m) for found in every for n, m in found.items()):
        if not bool(torch.isfinite(m.xx).all()):
            raise UsageError(f"the inputs of {name} are not finite on the calibration data: check the data and the network")
    return every


def in_stages(layers: Mapping[str, nn.Linear | _ConvNd], *, copies: int = 1) -> list[list[str]]:
    """Names of layers in groups whose second moments, so many of each, fit in memory together."""
    out: list[list[str]] = [[]]
    size = 0
    for name, module in layers.items():
        groups = getattr(module, "groups", 1)
        k = module.weight.numel() // (module.out_features if isinstance(module, nn.Linear) else module.out_channels)
        bytes_ = 4 * copies * groups * k**2
        if out[-1] and size + bytes_ > HELD_BYTES:
            out.append([])
            size = 0
        out[-1].append(name)
        size += bytes_
    return out
