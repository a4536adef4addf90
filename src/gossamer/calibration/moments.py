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

_ROUNDING = 1e-6  # of a float32 value, what its computation may have rounded
SHRINKAGE = 0.2
HELD_BYTES = 2**29
"""Second moments held at a time; layers beyond them wait for the next sweep over the batches."""


@dataclass(frozen=True)
class Moments:
    """Of the positions of a layer's input, for each group. About the mean: products of float32 values far from zero leave nothing of a small variance.

    Attributes:
        n: positions, or the sum of their weights.
        mean: ``(groups, K)``.
        scatter: sum of the outer products of what positions differ from the mean by, ``(groups, K, K)``.
    """

    n: float
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x_PGK: Tensor) -> Moments:
        """Of positions in a row."""
        mean_GK = x_PGK.mean(0)
        x_PGK = x_PGK - mean_GK
        one = x_PGK.shape[1] == 1
        scatter_GKK = (x_PGK[:, 0].T @ x_PGK[:, 0])[None] if one else x_PGK.permute(1, 2, 0) @ x_PGK.transpose(0, 1)
        return cls(len(x_PGK), mean_GK, scatter_GKK)

    def __add__(self, other: Moments) -> Moments:
        """Of both."""
        n, apart_GK = (self.n, other.n), other.mean - self.mean
        return Moments(sum(n), _mean(n, self.mean, apart_GK), _products(n, self.scatter, other.scatter, apart_GK, apart_GK))

    def double(self) -> Moments:
        """In float64."""
        return Moments(self.n, self.mean.double(), self.scatter.double())

    def varies(self) -> Tensor:
        """Which inputs vary by more than float32 rounds them, ``(groups, K)``."""
        return self.scatter.diagonal(dim1=1, dim2=2) / self.n > (_ROUNDING * self.mean).square()

    def covariance(self) -> Tensor:
        """``(groups, K, K)``; 0 for inputs that do not vary."""
        varies_GK = self.varies()
        return self.scatter / self.n * (varies_GK[:, :, None] & varies_GK[:, None])

    def about_zero(self) -> Tensor:
        """Mean of the outer products of the inputs as they are, ``(groups, K, K)``."""
        return self.covariance() + self.mean[:, :, None] * self.mean[:, None]


@dataclass(frozen=True)
class JointMoments:
    """Of a layer's inputs and of something else at the same positions; sums of several parts are float64.

    Examples:
        >>> x, y = torch.tensor([[[1.0, 2.0, 6.0]]]), torch.tensor([[[2.0, 4.0, 12.0]]])
        >>> parts = JointMoments.of(x[..., :2], y[..., :2]), JointMoments.of(x[..., 2:], y[..., 2:])
        >>> [round(c.item(), 6) for c in (parts[0] + parts[1]).covariances()]
        [4.666667, 9.333333]

    Attributes:
        inputs: moments of the inputs.
        mean: of the other, ``(groups, R)``.
        products: sum of the outer products of what the other and the inputs differ from their means by, ``(groups, R, K)``.
    """

    inputs: Moments
    mean: Tensor
    products: Tensor

    @classmethod
    def of(cls, x_GKN: Tensor, y_GRN: Tensor, weights_N: Tensor | None = None) -> JointMoments:
        """Of inputs and the other, positions in a row, which count by their weights where they have any."""
        n = x_GKN.shape[2] if weights_N is None else float(weights_N.sum())
        x_GK, y_GR = (t.mean(2) if weights_N is None else t @ weights_N / n for t in (x_GKN, y_GRN))
        x_GKN, y_GRN = x_GKN - x_GK[:, :, None], y_GRN - y_GR[:, :, None]
        x_GNK = (x_GKN if weights_N is None else x_GKN * weights_N).transpose(1, 2)
        return cls(Moments(n, x_GK, x_GKN @ x_GNK), y_GR, y_GRN @ x_GNK)

    def __add__(self, other: JointMoments) -> JointMoments:
        """Of both."""
        inputs, mean_GR, products_GRK = self.inputs.double(), self.mean.double(), self.products.double()
        n, apart_GK, apart_GR = (inputs.n, other.inputs.n), other.inputs.mean - inputs.mean, other.mean - mean_GR
        products_GRK = _products(n, products_GRK, other.products, apart_GR, apart_GK)
        return JointMoments(inputs + other.inputs, _mean(n, mean_GR, apart_GR), products_GRK)

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Of the inputs, ``(groups, K, K)``, and of the other with them, ``(groups, R, K)``; float32, 0 for inputs that do not vary."""
        return self.inputs.covariance().float(), (self.products / self.inputs.n * self.inputs.varies()[:, None]).float()


def _mean(n: tuple[float, float], mean: Tensor, apart: Tensor) -> Tensor:
    """Of two parts with so many positions, the means of which lie so far apart."""
    return mean + n[1] / sum(n) * apart


def _products(n: tuple[float, float], a_GRK: Tensor, b_GRK: Tensor, apart_GR: Tensor, apart_GK: Tensor) -> Tensor:
    """Of two parts, about the mean of both.

    Source:
        Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983, equation 2.1.
    """
    return (a_GRK + b_GRK).addcmul_(apart_GR[:, :, None], apart_GK[:, None], value=n[0] * n[1] / sum(n))


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
            found, new = every[count % parts], Moments.of(x_PGK)
            found[name] = found[name] + new if name in found else new

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
        if not bool(torch.isfinite(m.scatter).all()):
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
