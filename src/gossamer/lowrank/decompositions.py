"""Factors of one weight: SVD, spatial SVD and Tucker-2, of the weight alone or of what it does to its layer's inputs.

With the second moments C of the inputs (K x K, K inputs times kernel positions) what is minimised is the error of the outputs, tr(E C E^T),
not of the weight. C is shrunk to 0.8 C + 0.2 mean(diag C) I: few positions overfit. SVD is then exact; the others choose their first factors in
the whitened inputs, and the factors after them are least squares. Every function works on all groups at once, in float64.

Sources: Zhang et al., "Accelerating very deep convolutional networks", TPAMI 2016 (SVD of outputs); Jaderberg et al., BMVC 2014 (spatial);
Kim et al., ICLR 2016 (Tucker-2, with HOOI of De Lathauwer et al., 2000); Ledoit and Wolf, 2004 (shrinkage).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.calibration import Moments
from gossamer.lowrank.structure import Ranks

SHRINKAGE = 0.2
SWEEPS = 8
"""Of higher-order orthogonal iteration: the error changes in the fourth digit after that."""
EPSILON = 1e-10
"""Of the mean of the diagonal, added to normal equations that may be singular: a feature that is always zero."""


def shrunk(moments: Moments) -> Tensor:
    """Covariance of a layer's inputs, shrunk: ``(groups, K, K)``, float64, positive definite. Inputs that never change count alike."""
    c_GKK = moments.covariance().double()
    average_G1 = c_GKK.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    silent_G1 = average_G1 <= 1e-20
    diagonal_GK = torch.where(silent_G1, 1.0, SHRINKAGE * average_G1).expand(c_GKK.shape[:2])
    return torch.where(silent_G1[:, :, None], 0.0, (1 - SHRINKAGE) * c_GKK) + torch.diag_embed(diagonal_GK)


def svd(w: Tensor, rank: int, c_GKK: Tensor | None = None) -> list[Tensor]:
    """The weight as two factors, a convolution with its kernel and a pointwise one.

    Example:
        >>> w = torch.randn(1, 8, 3, 3, 3, dtype=torch.float64)
        >>> first, last = svd(w, 8)
        >>> first.shape, last.shape, bool(torch.dist(torch.einsum("grixy,gor->goixy", first, last[..., 0, 0]), w) < 1e-10)
        (torch.Size([1, 8, 3, 3, 3]), torch.Size([1, 8, 8, 1, 1]), True)

    Args:
        w: ``(groups, outs, ins, *kernel)``, float64.
        rank: of each group.
        c_GKK: second moments of the inputs, as `shrunk` gives them; None minimises the weight's error.

    Returns:
        Weights of the layers that `factors_of` lists, in the same form.
    """
    w_GOK = w.flatten(2)
    first_GRK, last_GOR = _split(w_GOK, None if c_GKK is None else torch.linalg.cholesky(c_GKK), rank)
    return balanced([first_GRK.reshape(-1, rank, *w.shape[2:]), _pointwise(last_GOR, w)])


def spatial_svd(w: Tensor, rank: int, c_GKK: Tensor | None = None) -> list[Tensor]:
    """The weight as a convolution along the first wide kernel axis and one along the others; arguments as for `svd`."""
    groups, outs, ins, a, b = *w.shape[:3], *_first_and_rest(w)
    whiten = None if c_GKK is None else torch.linalg.cholesky(_columns(c_GKK, w))
    first_GRX, last_GYR = _split(unfolded("spatial_svd", w)[0], whiten, rank)  # outputs (O, b) from inputs (I, a)
    last = last_GYR.reshape(groups, outs, b, rank).transpose(2, 3)  # (G, O, R, b)
    if c_GKK is not None:
        features = torch.einsum("gria,bc->giabrc", first_GRX.reshape(groups, rank, ins, a), torch.eye(b, dtype=w.dtype, device=w.device))
        last = refit(w.flatten(2), last.flatten(2), features.flatten(4).flatten(1, 3), c_GKK).reshape(last.shape)
    kernel = list(w.shape[3:])
    at = next(i for i, k in enumerate(kernel) if k > 1)
    along = [k if i == at else 1 for i, k in enumerate(kernel)]
    across = [1 if i == at else k for i, k in enumerate(kernel)]
    return balanced([first_GRX.reshape(groups, rank, ins, *along), last.reshape(groups, outs, rank, *across)])


def tucker2(w: Tensor, ranks: Ranks, c_GKK: Tensor | None = None) -> list[Tensor]:
    """The weight as a pointwise convolution, one with its kernel between fewer channels, and a pointwise one; arguments as for `svd`."""
    groups, outs, ins, taps = *w.shape[:3], w[0, 0, 0].numel()
    w_GOIt = w.reshape(groups, outs, ins, taps)
    whiten = None if c_GKK is None else torch.linalg.cholesky(channels_of(c_GKK, w))
    x_GOIt = w_GOIt if whiten is None else torch.einsum("goit,gij->gojt", w_GOIt, whiten)
    in_GIA, out_GOB = hooi(x_GOIt, ranks)
    if c_GKK is not None:  # the best outputs are known exactly
        out_GOB = leading(w.flatten(2) @ c_GKK @ w.flatten(2).transpose(1, 2), ranks[1])
        in_GIA = leading(_gram(torch.einsum("goit,gob->gbit", x_GOIt, out_GOB), 2), ranks[0])
    core_GBAt = torch.einsum("goit,gob,gia->gbat", x_GOIt, out_GOB, in_GIA)
    first_GAI = in_GIA.transpose(1, 2)
    if whiten is not None and c_GKK is not None:
        first_GAI = torch.linalg.solve_triangular(whiten, first_GAI, upper=False, left=False)
        features = torch.einsum("gai,tu->gitau", first_GAI, torch.eye(taps, dtype=w.dtype, device=w.device)).flatten(3).flatten(1, 2)
        aim = out_GOB.transpose(1, 2) @ w.flatten(2)
        core_GBAt = refit(aim, core_GBAt.flatten(2), features, c_GKK).reshape(core_GBAt.shape)
        out_GOB = refit(w.flatten(2), out_GOB, features @ core_GBAt.flatten(2).transpose(1, 2), c_GKK)
    core = core_GBAt.reshape(groups, ranks[1], ranks[0], *w.shape[3:])
    return balanced([_pointwise(first_GAI, w), core, _pointwise(out_GOB, w)])


def hooi(x_GOIt: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Higher-order orthogonal iteration on the inputs and the outputs: their bases ``(groups, ins, a)`` and ``(groups, outs, b)``."""
    a, b = ranks
    in_GIA = leading(_gram(x_GOIt, 2), a)
    out_GOB = leading(_gram(torch.einsum("goit,gia->goat", x_GOIt, in_GIA), 1), b)
    if (a, b) != (x_GOIt.shape[2], x_GOIt.shape[1]):
        for _ in range(SWEEPS):
            in_GIA = leading(_gram(torch.einsum("goit,gob->gbit", x_GOIt, out_GOB), 2), a)
            out_GOB = leading(_gram(torch.einsum("goit,gia->goat", x_GOIt, in_GIA), 1), b)
    return in_GIA, out_GOB


def refit(w_GOK: Tensor, last_GOF: Tensor, features_GKF: Tensor, c_GKK: Tensor) -> Tensor:
    """Least squares for the last factor: outputs from features that are linear in the inputs, ``features^T x``.

    Example:
        >>> w, features = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0], [0.0]]])
        >>> refit(w, torch.zeros(1, 1, 1), features, torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]))
        tensor([[[1.5000]]])
    """
    cf_GKF = c_GKK @ features_GKF
    normal_GFF = features_GKF.transpose(1, 2) @ cf_GKF
    diagonal = normal_GFF.diagonal(dim1=1, dim2=2)
    normal_GFF = normal_GFF + torch.diag_embed((EPSILON * diagonal.mean(1, keepdim=True) + 1e-30).expand_as(diagonal))
    missing_GOF = (w_GOK - last_GOF @ features_GKF.transpose(1, 2)) @ cf_GKF
    return last_GOF + torch.linalg.solve(normal_GFF, missing_GOF, left=False)


def energies(matrix_GMM: Tensor) -> Tensor:
    """Eigenvalues of positive semi-definite matrices, descending, never below zero: ``(groups, M)``."""
    return torch.linalg.eigvalsh(matrix_GMM).flip(1).clamp(min=0)


def unfolded(method: str, w: Tensor) -> list[Tensor]:
    """For each rank of a method the matrices whose rank it is, one for each group: ``(groups, rows, columns)``."""
    if method == "tucker2":
        return [w.movedim(2, 1).flatten(2), w.flatten(2)]
    if method == "spatial_svd":
        groups, outs, ins, a, b = *w.shape[:3], *_first_and_rest(w)
        return [w.reshape(groups, outs, ins, a, b).permute(0, 1, 4, 2, 3).reshape(groups, outs * b, ins * a)]
    return [w.flatten(2)]


def spectra(method: str, w: Tensor, c_GKK: Tensor | None = None) -> list[Tensor]:
    """For each rank of a method the energies, descending, that the choice of that rank keeps or drops: ``(groups, full rank)``."""
    matrices = unfolded(method, w)
    if c_GKK is not None and method == "svd":
        matrices = [matrices[0] @ torch.linalg.cholesky(c_GKK)]
    if c_GKK is not None and method == "spatial_svd":
        matrices = [matrices[0] @ torch.linalg.cholesky(_columns(c_GKK, w))]
    if c_GKK is not None and method == "tucker2":
        half = torch.linalg.cholesky(channels_of(c_GKK, w))
        whitened = torch.einsum("goit,gij->gjot", w.flatten(3), half).flatten(2)
        matrices = [whitened, matrices[1] @ torch.linalg.cholesky(c_GKK)]
    return [energies(m @ m.transpose(1, 2) if m.shape[1] <= m.shape[2] else m.transpose(1, 2) @ m) for m in matrices]


def leading(matrix_GMM: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors of symmetric matrices: ``(groups, M, rank)``."""
    return torch.linalg.eigh(matrix_GMM).eigenvectors.flip(2)[:, :, :rank]


def balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors scaled to equal norms: their product stays."""
    norms = [float(f.norm()) for f in factors]
    if min(norms) <= 1e-30:
        return list(factors)
    mean = torch.tensor(norms, dtype=torch.float64).log().mean().exp()
    return [f * (mean / n).to(f.dtype) for f, n in zip(factors, norms, strict=True)]


def _split(w_GYX: Tensor, whiten: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The best product of two matrices for inputs of covariance ``whiten whiten^T``: ``(rank, X)`` and ``(Y, rank)``, by the smaller side."""
    x_GYX = w_GYX if whiten is None else w_GYX @ whiten
    if x_GYX.shape[1] <= x_GYX.shape[2]:
        last_GYR = leading(x_GYX @ x_GYX.transpose(1, 2), rank)
        return last_GYR.transpose(1, 2) @ w_GYX, last_GYR
    basis_GXR = leading(x_GYX.transpose(1, 2) @ x_GYX, rank)
    first_GRX = basis_GXR.transpose(1, 2)
    if whiten is not None:
        first_GRX = torch.linalg.solve_triangular(whiten, first_GRX, upper=False, left=False)
    return first_GRX, x_GYX @ basis_GXR


def channels_of(c_GKK: Tensor, w: Tensor) -> Tensor:
    """Second moments of the input channels, averaged over kernel positions: ``(groups, ins, ins)``."""
    ins, taps = w.shape[2], w[0, 0, 0].numel()
    return c_GKK.reshape(-1, ins, taps, ins, taps).diagonal(dim1=2, dim2=4).mean(-1)


def _columns(c_GKK: Tensor, w: Tensor) -> Tensor:
    """Second moments of what lies under the first wide kernel axis, averaged over the others: ``(groups, ins * a, ins * a)``."""
    ins, (a, b) = w.shape[2], _first_and_rest(w)
    c = c_GKK.reshape(-1, ins, a, b, ins, a, b).diagonal(dim1=3, dim2=6).mean(-1)
    return c.reshape(-1, ins * a, ins * a)


def _gram(x_GOIt: Tensor, dim: int) -> Tensor:
    rows = x_GOIt.movedim(dim, 1).flatten(2)
    return rows @ rows.transpose(1, 2)


def _first_and_rest(w: Tensor) -> tuple[int, int]:
    """Length of the first kernel axis longer than 1, and the product of the others."""
    first = next(k for k in w.shape[3:] if k > 1)
    return first, w[0, 0, 0].numel() // first


def _pointwise(matrix_GOI: Tensor, w: Tensor) -> Tensor:
    return matrix_GOI.reshape(*matrix_GOI.shape, *(1,) * (w.dim() - 3))
