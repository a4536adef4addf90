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

from gossamer.lowrank.structure import Ranks

SWEEPS = 8
"""Of higher-order orthogonal iteration: the error changes in the fourth digit after that."""
EPSILON = 1e-10
"""Of the mean of the diagonal, added to normal equations that may be singular: a feature that is always zero."""


def svd(w: Tensor, rank: int, c_GKK: Tensor | None = None) -> list[Tensor]:
    """The weight as two factors, a convolution with its kernel and a pointwise one.

    Examples:
        >>> w = torch.randn(1, 8, 3, 3, 3, dtype=torch.float64)
        >>> first, last = svd(w, 8)
        >>> first.shape, last.shape, bool(torch.dist(torch.einsum("grixy,gor->goixy", first, last[..., 0, 0]), w) < 1e-10)
        (torch.Size([1, 8, 3, 3, 3]), torch.Size([1, 8, 8, 1, 1]), True)

    Args:
        w: ``(groups, outs, ins, *kernel)``, float64.
        rank: of each group.
        c_GKK: second moments of the inputs, as `gossamer.calibration.shrunk` gives them; None minimises the weight's error.

    Returns:
        Weights of the layers that `factors_of` lists, in the same form.
    """
    w_GOK = w.flatten(2)
    first_GRK, last_GOR = _split(w_GOK, c_GKK, rank)
    return balanced([first_GRK.reshape(-1, rank, *w.shape[2:]), _pointwise(last_GOR, w)])


def spatial_svd(w: Tensor, rank: int, c_GKK: Tensor | None = None) -> list[Tensor]:
    """The weight as a convolution along the first wide kernel axis and one along the others; arguments as for `svd`."""
    groups, outs, ins, a, b = *w.shape[:3], *_first_and_rest(w)
    columns = None if c_GKK is None else _columns(c_GKK, w)
    first_GRX, last_GYR = _split(unfolded("spatial_svd", w)[0], columns, rank)  # outputs (O, b) from inputs (I, a)
    last = last_GYR.reshape(groups, outs, b, rank).transpose(2, 3)  # (G, O, R, b)
    if c_GKK is not None:  # features (b, R) of the inputs (I, a, b): the first factor at each position along the other axes
        first = first_GRX.reshape(groups, rank, ins, a)
        cf = torch.einsum("gkiac,gria->gkcr", c_GKK.reshape(groups, -1, ins, a, b), first)
        normal = torch.einsum("giabcr,gqia->gbqcr", cf.reshape(groups, ins, a, b, b, rank), first).reshape(groups, b * rank, b * rank)
        aim = w.reshape(groups, outs, ins, a, b)
        missing = aim - torch.einsum("gorb,gria->goiab", last, first)
        flat = last.transpose(2, 3).flatten(2)
        last = refit(missing.flatten(2), flat, cf.flatten(2), normal).reshape(groups, outs, b, rank).transpose(2, 3)
    kernel = list(w.shape[3:])
    at = next(i for i, k in enumerate(kernel) if k > 1)
    along = [k if i == at else 1 for i, k in enumerate(kernel)]
    across = [1 if i == at else k for i, k in enumerate(kernel)]
    return balanced([first_GRX.reshape(groups, rank, ins, *along), last.reshape(groups, outs, rank, *across)])


def tucker2(w: Tensor, ranks: Ranks, c_GKK: Tensor | None = None) -> list[Tensor]:
    """The weight as a pointwise convolution, one with its kernel between fewer channels, and a pointwise one; arguments as for `svd`."""
    groups, outs, ins, taps = *w.shape[:3], w[0, 0, 0].numel()
    w_GOIt = w.reshape(groups, outs, ins, taps)
    if c_GKK is None:
        in_GIA, out_GOB = hooi(w_GOIt, ranks)
        core_GBAt = torch.einsum("goit,gob,gia->gbat", w_GOIt, out_GOB, in_GIA)
        first_GAI = in_GIA.transpose(1, 2)
    else:  # the best outputs are known exactly
        out_GOB = leading(w.flatten(2) @ c_GKK @ w.flatten(2).transpose(1, 2), ranks[1])
        aim_GBIt = torch.einsum("goit,gob->gbit", w_GOIt, out_GOB)
        half_GII = torch.linalg.cholesky(channels_of(c_GKK, w))
        in_GIA = leading(_gram(torch.einsum("gbit,gij->gbjt", aim_GBIt, half_GII), 2), ranks[0])
        first_GAI = torch.linalg.solve_triangular(half_GII, in_GIA.transpose(1, 2), upper=False, left=False)
        # features (t, A) of the inputs (I, t): the first factor at each kernel position
        cf = torch.einsum("gkiu,gai->gkua", c_GKK.reshape(groups, -1, ins, taps), first_GAI)
        normal = torch.einsum("gitua,gbi->gtbua", cf.reshape(groups, ins, taps, taps, -1), first_GAI)
        normal = normal.reshape(groups, taps * ranks[0], -1)
        core_GBtA = torch.einsum("gbit,gij,gja->gbta", aim_GBIt, half_GII, in_GIA)
        missing = aim_GBIt - torch.einsum("gbta,gai->gbit", core_GBtA, first_GAI)
        flat = refit(missing.flatten(2), core_GBtA.flatten(2), cf.flatten(2), normal)
        core_GBAt = flat.reshape(groups, ranks[1], taps, ranks[0]).transpose(2, 3)
        missing = w_GOIt - torch.einsum("gob,gbat,gai->goit", out_GOB, core_GBAt, first_GAI)
        out_GOB = refit(missing.flatten(2), out_GOB, cf.flatten(2) @ flat.transpose(1, 2), flat @ normal @ flat.transpose(1, 2))
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


def refit(missing_GOK: Tensor, last_GOF: Tensor, cf_GKF: Tensor, normal_GFF: Tensor) -> Tensor:
    """Least squares for the last factor: outputs from features that are linear in the inputs, ``F^T x``.

    Examples:
        >>> w, c, f = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]), torch.tensor([[[1.0], [0.0]]])
        >>> refit(w, torch.zeros(1, 1, 1), c @ f, f.mT @ c @ f)
        tensor([[[1.5000]]])

    Args:
        missing_GOK: what the factors so far lack of the weight.
        last_GOF: the last factor so far.
        cf_GKF: second moments of the inputs times F.
        normal_GFF: second moments of the features.
    """
    diagonal = normal_GFF.diagonal(dim1=1, dim2=2)
    normal_GFF = normal_GFF + torch.diag_embed((EPSILON * diagonal.mean(1, keepdim=True) + 1e-30).expand_as(diagonal))
    return last_GOF + torch.linalg.solve(normal_GFF, missing_GOK @ cf_GKF, left=False)


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


def _split(w_GYX: Tensor, c_GXX: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The best product of two matrices for inputs of second moments C: ``(rank, X)`` and ``(Y, rank)``, by the smaller side."""
    if w_GYX.shape[1] <= w_GYX.shape[2]:
        last_GYR = leading((w_GYX if c_GXX is None else w_GYX @ c_GXX) @ w_GYX.transpose(1, 2), rank)
        return last_GYR.transpose(1, 2) @ w_GYX, last_GYR
    half_GXX = None if c_GXX is None else torch.linalg.cholesky(c_GXX)
    x_GYX = w_GYX if half_GXX is None else w_GYX @ half_GXX
    basis_GXR = leading(x_GYX.transpose(1, 2) @ x_GYX, rank)
    first_GRX = basis_GXR.transpose(1, 2)
    if half_GXX is not None:
        first_GRX = torch.linalg.solve_triangular(half_GXX, first_GRX, upper=False, left=False)
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
