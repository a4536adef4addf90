"""Weights of what stands in for a convolution: of its weight alone, or of what it does to its inputs.

With the second moments C of the inputs (K x K, as `gossamer.calibration.shrunk` gives them) what is minimised is the error of the outputs,
tr(E C E^T). Every function works on all groups and channels at once, in float64.

Sources: depthwise-separable terms: Guo et al., "Network decoupling: from regular to depthwise separable convolutions", BMVC 2018; bottleneck:
Kim et al., ICLR 2016 (Tucker-2, here by one principal component analysis on each side).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SWEEPS = 3
"""Of alternation between kernels and pointwise weights: what more of them gain is in the third digit."""
STEPS = 10
"""Of conjugate gradients, for the kernels in each sweep."""
EPSILON = 1e-10
"""Of the mean of the diagonal, added to normal equations that may be singular."""


def separable(w: Tensor, terms: int, c_GKK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A kernel for each term of each input channel, and the pointwise weight on them.

    Without data that is the SVD of each channel's ``(outs, positions)`` matrix, so that all terms are exact. With data each channel's kernels are
    chosen in its whitened inputs; then pointwise weights and kernels are fitted in turn, all channels together.

    Examples:
        >>> w = torch.randn(1, 8, 3, 3, 3, dtype=torch.float64)
        >>> d_GITt, p_GOIT = separable(w, 8)
        >>> d_GITt.shape, p_GOIT.shape, bool(torch.dist(product_of_terms(d_GITt, p_GOIT), w.flatten(3)) < 1e-6)
        (torch.Size([1, 3, 8, 9]), torch.Size([1, 8, 3, 8]), True)

    Args:
        w: ``(groups, outs, ins, *kernel)``, float64.
        terms: from 1 to the smaller of outs and kernel positions.
        c_GKK: second moments of the inputs, or None.

    Returns:
        Kernels ``(groups, ins, terms, positions)`` and pointwise weights ``(groups, outs, ins, terms)``.
    """
    ins = w.shape[2]
    w_GIOt = w.flatten(3).transpose(1, 2)
    if c_GKK is None:
        d_GITt = _leading(w_GIOt.transpose(2, 3) @ w_GIOt, terms).transpose(2, 3)
        p_GOIT = torch.einsum("giot,giTt->goiT", w_GIOt, d_GITt)
    else:
        half_GItt = torch.linalg.cholesky(own_blocks(c_GKK, ins))
        x_GIOt = w_GIOt @ half_GItt
        basis_GItT = _leading(x_GIOt.transpose(2, 3) @ x_GIOt, terms)
        p_GOIT = (x_GIOt @ basis_GItT).transpose(1, 2)
        d_GITt = torch.linalg.solve_triangular(half_GItt, basis_GItT.transpose(2, 3), upper=False, left=False)
        if terms < min(w_GIOt.shape[2:]):
            p_GOIT = _pointwise(w, d_GITt, p_GOIT, c_GKK)
            for _ in range(SWEEPS):
                d_GITt = _kernels(w, d_GITt, p_GOIT, c_GKK)
                p_GOIT = _pointwise(w, d_GITt, p_GOIT, c_GKK)
    size_GIT = d_GITt.norm(dim=3).clamp(min=1e-30)
    d_GITt, p_GOIT = d_GITt / size_GIT[..., None], p_GOIT * size_GIT[:, None]
    scale = (p_GOIT.norm().clamp(min=1e-30) / d_GITt.norm().clamp(min=1e-30)).sqrt()
    return d_GITt * scale, p_GOIT / scale


def laid_out(d_GITt: Tensor, p_GOIT: Tensor, kernel: Sequence[int], *, repeated: bool) -> list[Tensor]:
    """Kernels and pointwise weights as those of two convolutions, ``(groups, outs, ins, *kernel)`` each.

    Args:
        d_GITt, p_GOIT: from `separable`.
        kernel: its size.
        repeated: the inputs come once for each term, so that terms go before inputs.
    """
    groups, ins, terms, _ = d_GITt.shape
    if repeated:
        d_GITt, p_GOIT = d_GITt.transpose(1, 2), p_GOIT.transpose(2, 3)
    each = 1 if repeated else terms
    return [d_GITt.reshape(-1, each, 1, *kernel), p_GOIT.reshape(groups, -1, ins * terms, *(1,) * len(kernel))]


def bottleneck(w: Tensor, sizes: Sequence[int], c_GKK: Tensor | None = None) -> list[Tensor]:
    """Pointwise to fewer channels, the kernel between them, pointwise back; arguments as for `separable`.

    The inner outputs are the principal components of the outputs, the inner inputs those of the inputs' channels that these need; what is
    between is least squares.
    """
    a, b = sizes
    groups, _, ins = w.shape[:3]
    w_GOIt = w.flatten(3)
    c = c_GKK
    matrix_GOK = w.flatten(2)
    up_GOB = _leading((matrix_GOK if c is None else matrix_GOK @ c) @ matrix_GOK.transpose(1, 2), b)
    aim_GBIt = torch.einsum("goit,gob->gbit", w_GOIt, up_GOB)
    if c is None:
        rows = aim_GBIt.movedim(2, 1).flatten(2)
        down_GAI = _leading(rows @ rows.transpose(1, 2), a).transpose(1, 2)
        core_GBAt = torch.einsum("gbit,gai->gbat", aim_GBIt, down_GAI)
    else:
        taps = w_GOIt.shape[3]
        channels_GII = c.reshape(groups, ins, taps, ins, taps).diagonal(dim1=2, dim2=4).mean(-1)
        half_GII = torch.linalg.cholesky(channels_GII)
        rows = torch.einsum("gbit,gij->gjbt", aim_GBIt, half_GII).flatten(2)
        down_GAI = torch.linalg.solve_triangular(
            half_GII, _leading(rows @ rows.transpose(1, 2), a).transpose(1, 2), upper=False, left=False
        )
        cf_GKAt = torch.einsum("gkiu,gai->gkau", c.reshape(groups, -1, ins, taps), down_GAI)
        normal = torch.einsum("gituv,gbi->gbtuv", cf_GKAt.reshape(groups, ins, taps, a, taps), down_GAI).reshape(groups, a * taps, -1)
        core_GBAt = _solved(normal, aim_GBIt.flatten(2) @ cf_GKAt.flatten(2)).reshape(groups, b, a, taps)
    one = (1,) * (w.dim() - 3)
    parts = [down_GAI.reshape(groups, a, ins, *one), core_GBAt.reshape(groups, b, a, *w.shape[3:]), up_GOB.reshape(*up_GOB.shape, *one)]
    norms = torch.stack([p.norm().clamp(min=1e-30) for p in parts])
    mean = norms.log().mean().exp()
    return [p * (mean / n) for p, n in zip(parts, norms, strict=True)]


def grouped(w: Tensor, blocks: int, inputs: Tensor, outputs: Tensor, c_GKK: Tensor | None = None) -> list[Tensor]:
    """The weights of a grouped convolution between two orders of channels: those that there are, or with data least squares.

    Args:
        w: ``(groups, outs, ins, *kernel)``, float64.
        blocks: within each group.
        inputs, outputs: ``(groups, ins)`` and ``(groups, outs)``: channels within a group, in the order of the blocks.
        c_GKK: second moments of the inputs, or None.
    """
    groups, outs, ins = w.shape[:3]
    w_GOIt = w.flatten(3)
    taps = w_GOIt.shape[3]
    kept_GBoit = _blocks(w_GOIt, blocks, inputs, outputs)
    if c_GKK is not None:
        cross_GOIt = (w.flatten(2) @ c_GKK).reshape(w_GOIt.shape)  # of each output with every input
        right = _blocks(cross_GOIt, blocks, inputs, outputs).flatten(3)
        at = (inputs[:, :, None] * taps + torch.arange(taps)).reshape(groups, blocks, -1)
        g = torch.arange(groups)[:, None, None, None]
        kept_GBoit = _solved(c_GKK[g, at[..., None], at[:, :, None]].flatten(0, 1), right.flatten(0, 1))
    return [kept_GBoit.reshape(groups * blocks, outs // blocks, ins // blocks, *w.shape[3:])]


def energies(w: Tensor, c_GKK: Tensor | None = None) -> Tensor:
    """What each input channel alone does to each output: ``(groups, outs, ins)``."""
    w_GOIt = w.flatten(3)
    if c_GKK is None:
        return w_GOIt.square().sum(3)
    return torch.einsum("goit,gitu,goiu->goi", w_GOIt, own_blocks(c_GKK, w.shape[2]), w_GOIt)


def explained(w: Tensor, blocks: int, inputs: Tensor, c_GKK: Tensor) -> Tensor:
    """What the inputs of each block can tell of each output, by least squares: ``(groups, outs, blocks)``; arguments as for `grouped`."""
    groups, taps = len(w), w[0, 0, 0].numel()
    at = (inputs[:, :, None] * taps + torch.arange(taps)).reshape(groups, blocks, -1)
    g = torch.arange(groups)[:, None, None]
    cross_GBOk = (w.flatten(2) @ c_GKK).transpose(1, 2)[g, at].transpose(2, 3)
    within = c_GKK[g[..., None], at[..., None], at[:, :, None]]
    return (_solved(within, cross_GBOk) * cross_GBOk).sum(3).transpose(1, 2)


def irreplaceable(w: Tensor, c_GKK: Tensor) -> Tensor:
    """What each output loses without an input channel if all others make up for it: ``(groups, outs, ins)``."""
    w_GOIt = w.flatten(3)
    alone = torch.linalg.inv(own_blocks(torch.linalg.inv(c_GKK), w.shape[2]))
    return torch.einsum("goit,gitu,goiu->goi", w_GOIt, alone, w_GOIt).clamp(min=0)


def product_of_terms(d_GITt: Tensor, p_GOIT: Tensor) -> Tensor:
    """The weight that depthwise-separable terms stand for, ``(groups, outs, ins, positions)``."""
    return torch.einsum("goiT,giTt->goit", p_GOIT, d_GITt)


def own_blocks(c_GKK: Tensor, ins: int) -> Tensor:
    """Second moments of each input channel's own positions: ``(groups, ins, positions, positions)``."""
    taps = c_GKK.shape[1] // ins
    return c_GKK.reshape(-1, ins, taps, ins, taps).diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _blocks(x_GOIt: Tensor, blocks: int, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Of channels in their orders, the blocks of the diagonal: ``(groups, blocks, outs, ins, positions)``."""
    groups = len(x_GOIt)
    o, i = outputs.reshape(groups, blocks, -1), inputs.reshape(groups, blocks, -1)
    g = torch.arange(groups)[:, None, None, None]
    return x_GOIt[g, o[..., None], i[:, :, None]]


def _pointwise(w: Tensor, d_GITt: Tensor, p_GOIT: Tensor, c_GKK: Tensor) -> Tensor:
    """The best pointwise weights for given kernels."""
    groups, _, ins, taps = *w.shape[:3], d_GITt.shape[3]
    missing_GOK = (w.flatten(3) - torch.einsum("goiT,giTt->goit", p_GOIT, d_GITt)).flatten(2)
    cf_GKIT = torch.einsum("gkit,giTt->gkiT", c_GKK.reshape(groups, -1, ins, taps), d_GITt)
    normal = torch.einsum("giTt,gitjS->giTjS", d_GITt, cf_GKIT.reshape(groups, ins, taps, ins, -1))
    size = ins * d_GITt.shape[2]
    return p_GOIT + _solved(normal.reshape(groups, size, size), missing_GOK @ cf_GKIT.flatten(2)).reshape(p_GOIT.shape)


def _kernels(w: Tensor, d_GITt: Tensor, p_GOIT: Tensor, c_GKK: Tensor) -> Tensor:
    """Better kernels for given pointwise weights, by conjugate gradients on the normal equations."""
    groups, _, ins, taps = *w.shape[:3], d_GITt.shape[3]
    c = c_GKK.reshape(groups, ins, taps, ins, taps)
    flat = p_GOIT.flatten(2)
    gram = (flat.transpose(1, 2) @ flat).reshape(groups, ins, -1, ins, d_GITt.shape[2])
    missing_GOK = (w.flatten(3) - torch.einsum("goiT,giTt->goit", p_GOIT, d_GITt)).flatten(2)
    left = torch.einsum("goiT,goit->giTt", p_GOIT, (missing_GOK @ c_GKK).reshape(groups, -1, ins, taps))
    step, energy = left.clone(), left.square().sum()
    for _ in range(STEPS):
        if float(energy) <= 1e-30:
            break
        moved = torch.einsum("giTjS,gitjS->giTt", gram, torch.einsum("gitju,gjSu->gitjS", c, step))
        length = energy / (step * moved).sum().clamp(min=1e-300)
        d_GITt, left = d_GITt + length * step, left - length * moved
        before, energy = energy, left.square().sum()
        step = left + energy / before * step
    return d_GITt


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors of symmetric matrices: ``(..., M, rank)``."""
    return torch.linalg.eigh(matrix).eigenvectors.flip(-1)[..., :rank]


def _solved(normal: Tensor, right: Tensor) -> Tensor:
    """``right`` times the inverse of normal equations that may be singular."""
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    ridge = torch.diag_embed((EPSILON * diagonal.mean(-1, keepdim=True) + 1e-30).expand_as(diagonal))
    return torch.linalg.solve(normal + ridge, right, left=False)
