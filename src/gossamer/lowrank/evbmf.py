"""The rank of a matrix under noise of unknown strength, by empirical variational Bayes, in closed form but for one scalar search.

Source: Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix factorization", JMLR 2013.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import UsageError


def evbmf_rank(matrix: Tensor) -> int:
    """How many singular values of a matrix stand out of noise; 0 where none does.

    It finds the rank of synthetic data; on trained weights, whose small singular values are no noise, it is far off.

    Examples:
        >>> g = torch.Generator().manual_seed(0)
        >>> low = torch.randn(60, 4, generator=g) @ torch.randn(4, 80, generator=g)
        >>> evbmf_rank(low + 0.5 * torch.randn(60, 80, generator=g))
        4

    Args:
        matrix: two-dimensional, finite.

    Returns:
        The rank, from 0 to the smaller size.

    Raises:
        UsageError: not a matrix, or values that are not finite.
    """
    from scipy.optimize import minimize_scalar

    if matrix.dim() != 2 or not matrix.numel() or not bool(torch.isfinite(matrix).all()):
        raise UsageError(f"evbmf_rank takes a matrix of finite numbers, not shape {tuple(matrix.shape)}")
    values = torch.linalg.svdvals(matrix.double()).cpu().numpy()
    small, large = sorted(matrix.shape)
    if values[0] <= 0 or small == 1:
        return int(values[0] > 0)
    ratio = small / large
    tau = 2.5129 * np.sqrt(ratio)  # where the posterior of a component leaves zero, as a good approximation of the paper's root
    edge = (1 + tau) * (1 + ratio / tau)
    squares = (values / values[0]) ** 2  # the search below has an absolute tolerance

    def free_energy(variance: float) -> float:
        x = squares / (large * variance)
        above, below = x[x > edge], x[x <= edge]
        shifted = above - (1 + ratio)
        t = 0.5 * (shifted + np.sqrt(np.maximum(shifted**2 - 4 * ratio, 0)))
        noise = np.sum(below - np.log(np.maximum(below, 1e-300)))
        return float(noise + np.sum(above - t + np.log((t + 1) / above) + ratio * np.log(t / ratio + 1)))

    most = min(int(np.ceil(small / (1 + ratio))) - 1, small - 1)
    lowest = max(squares[most] / (large * edge), squares[most:].mean() / large)
    highest = squares.sum() / (small * large)
    if lowest <= 1e-12 * highest:  # the rest is zero but for rounding: there is no noise
        return int((squares > 1e-12).sum())
    found = minimize_scalar(
        free_energy, bounds=(lowest, max(highest, lowest * (1 + 1e-9))), method="bounded", options={"xatol": 1e-4 * lowest}
    )
    return int((squares > large * found.x * edge).sum())
