"""Canonical polyadic decomposition: a weight as a sum of rank-one terms, by regularised alternating least squares.

For every mode in turn the factor that fits best is solved for, all groups at once. A penalty on the factors' norms keeps terms from growing
against one another (a tensor can lack a best approximation of its rank); where they do all the same, `CPFit.degenerate` says so.

Sources: Carroll and Chang, Psychometrika 1970; Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned CP-decomposition",
ICLR 2015; degeneracy: de Silva and Lim, SIAM J. Matrix Anal. 2008; Phan et al., "Stable low-rank tensor decomposition", ECCV 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gossamer.errors import UsageError
from gossamer.lowrank.decompositions import channels_of, leading, refit

RIDGE = 1e-2
"""Of the penalty, as a fraction of what a factor's normal equations hold when terms do not overlap."""
SWEEPS = 200
TOLERANCE = 1e-4
"""The relative error, compared every `EVERY` sweeps, must fall by this fraction of itself, or the iteration stops."""
EVERY = 5
POLISH = 10
"""Sweeps on the whole weight after those on the weight in its leading subspaces."""
CANCELLING = 10.0
"""Terms whose squared norms sum to more than this many times that of their sum cancel one another: the decomposition is degenerate."""


@dataclass(frozen=True)
class CPFit:
    """A decomposition and how it went.

    Attributes:
        factors: one for each mode, ``(groups, size, rank)``, each term's norm spread evenly over them.
        error: relative Frobenius norm of what is missing.
        sweeps: carried out.
        converged: whether it stopped by itself.
        cancelling: squared norms of the terms, summed, over that of their sum: 1 where they are orthogonal.
    """

    factors: tuple[Tensor, ...]
    error: float
    sweeps: int
    converged: bool
    cancelling: float

    @property
    def degenerate(self) -> bool:
        """Whether terms cancel one another: such factors are ill-conditioned, hard to train and to quantise."""
        return self.cancelling > CANCELLING


def cp_als(
    x: Tensor,
    rank: int,
    *,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
    ridge: float = RIDGE,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CPFit:
    """Decompose a tensor into ``rank`` rank-one terms.

    Examples:
        >>> a, b, c = (torch.randn(1, n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (6, 5, 4))
        >>> fit = cp_als(torch.einsum("gar,gbr,gcr->gabc", a, b, c), 2, ridge=0)
        >>> fit.error < 1e-2, [tuple(f.shape) for f in fit.factors]
        (True, [(1, 6, 2), (1, 5, 2), (1, 4, 2)])

    Args:
        x: ``(groups, d1, ..., dN)`` with at least two modes; groups are decomposed independently.
        rank: number of terms; from the product of all sizes but the largest on the decomposition is exact and no iteration takes place.
        sweeps: at most.
        tolerance: of the stopping rule, on the relative error.
        ridge: of the penalty, 0 or more.
        seed: of the start.
        progress: called with sweeps done and the most that can come.

    Returns:
        A `CPFit`.

    Raises:
        UsageError: fewer than two modes, a rank below 1, or values that are not finite.
    """
    if x.dim() < 3 or rank < 1 or ridge < 0 or sweeps < 1:
        raise UsageError(
            f"cp_als takes a tensor of groups and two or more modes, rank and sweeps of 1 or more, not {tuple(x.shape)}, {rank}, {sweeps}"
        )
    if not bool(torch.isfinite(x).all()):
        raise UsageError("cp_als: the tensor holds NaN or infinite values")
    sizes = x.shape[1:]
    if rank >= prod(sizes) // max(sizes):
        return _fit(x, _exact(x, rank), 0, True)
    generator = torch.Generator().manual_seed(seed)
    bases = [leading(_gram(x, m), rank) if rank < n else None for m, n in enumerate(sizes)]
    small = x
    for m, basis in enumerate(bases):
        if basis is not None:
            small = _along(small, basis.transpose(1, 2), m)
    compressed = small.shape != x.shape
    factors = [torch.randn(len(x), n, rank, generator=generator, dtype=torch.float64).to(x) for n in small.shape[1:]]
    total = sweeps + POLISH * compressed
    factors, done, converged = _sweep(small, factors, sweeps, tolerance, ridge, lambda n: progress(n, total) if progress else None)
    if compressed:
        factors = [f if b is None else b @ f for b, f in zip(bases, factors, strict=True)]
        factors, more, _ = _sweep(x, factors, POLISH, 0.0, ridge, lambda n: progress(sweeps + n, total) if progress else None)
        done += more
    return _fit(x, factors, done, converged)


def cp(w: Tensor, rank: int, c_GKK: Tensor | None = None, **options: object) -> tuple[list[Tensor], CPFit]:
    """Weights of the layers of a CP-factorised one, in the form of `svd`, with `CPFit`; ``options`` are those of `cp_als`.

    With second moments the decomposition is made in whitened inputs, and the last factor is least squares.
    """
    groups, outs, ins = w.shape[:3]
    axes = [a for a, k in enumerate(w.shape[3:]) if k > 1]
    x = w.reshape(groups, outs, ins, *(w.shape[3 + a] for a in axes))
    whiten = None
    if c_GKK is not None:
        whiten = torch.linalg.cholesky(channels_of(c_GKK, w))
        x = _along(x, whiten.transpose(1, 2), 1)
    fit = cp_als(x, rank, **options)  # type: ignore[arg-type]
    out_GOR, in_GIR, *along = fit.factors
    first_GRI = in_GIR.transpose(1, 2)
    if whiten is not None and c_GKK is not None:
        first_GRI = torch.linalg.solve_triangular(whiten, first_GRI, upper=False, left=False)
        features = first_GRI.transpose(1, 2)[:, :, None]
        for f in along:  # kernel positions in order, the last axis fastest
            features = (features[:, :, :, None] * f[:, None, None]).flatten(2, 3)
        features = features.flatten(1, 2)
        cf = c_GKK @ features
        missing = w.flatten(2) - out_GOR @ features.transpose(1, 2)
        out_GOR = refit(missing, out_GOR, cf, features.transpose(1, 2) @ cf)
    parts = _even([out_GOR, first_GRI.transpose(1, 2), *along])
    ones = (1,) * (w.dim() - 3)
    made = [parts[1].transpose(1, 2).reshape(groups, rank, ins, *ones)]
    for axis, f in zip(axes, parts[2:], strict=True):
        kernel = [k if a == axis else 1 for a, k in enumerate(w.shape[3:])]
        made.append(f.transpose(1, 2).reshape(groups * rank, 1, 1, *kernel))
    return [*made, parts[0].reshape(groups, outs, rank, *ones)], fit


def compose(factors: Sequence[Tensor]) -> Tensor:
    """The tensor that factors stand for: ``(groups, d1, ..., dN)``."""
    first, *others = factors
    rest = others[0][:, None]
    for f in others[1:]:
        rest = (rest[:, :, :, None] * f[:, None, None]).flatten(2, 3)
    return (first @ rest[:, 0].transpose(1, 2)).reshape(len(first), *(f.shape[1] for f in factors))


def _sweep(
    x: Tensor, factors: list[Tensor], sweeps: int, tolerance: float, ridge: float, tick: Callable[[int], None]
) -> tuple[list[Tensor], int, bool]:
    """Alternating least squares from given factors; the two largest modes cost one large product each."""
    norm_G = x.flatten(1).norm(dim=1).clamp(min=1e-30)
    modes = x.dim() - 1
    rank = factors[0].shape[2]
    penalty_G = ridge * (norm_G.square() / rank) ** ((modes - 1) / modes)
    order = sorted(range(modes), key=lambda m: -x.shape[m + 1])
    lead, others = order[0], order[1:]
    unfolded = x.movedim(lead + 1, 1)
    before = float("inf")
    factors = _even(factors)
    for n in range(1, sweeps + 1):
        contracted = torch.einsum("glx,glr->gxr", unfolded.flatten(2), factors[lead])  # (G, the other modes, R)
        contracted = contracted.reshape(len(x), *(x.shape[m + 1] for m in range(modes) if m != lead), rank)
        for mode in others:
            factors[mode] = _solve(_left(contracted, factors, mode, lead), factors, mode, penalty_G)
        rest = _khatri_rao([factors[m] for m in range(modes) if m != lead])
        product_GLR = unfolded.flatten(2) @ rest
        factors[lead] = _solve(product_GLR, factors, lead, penalty_G)
        tick(n)
        if n % EVERY == 0 or n == sweeps:
            inner = (product_GLR * factors[lead]).flatten(1).sum(1)
            square = _overlaps(factors).flatten(1).sum(1)
            error = float(((norm_G.square() - 2 * inner + square).clamp(min=0).sqrt() / norm_G).mean())
            if before - error <= tolerance * error and n < sweeps and tolerance > 0:
                return factors, n, True
            before = error
        factors = _even(factors)
    return factors, sweeps, False


def _left(contracted: Tensor, factors: Sequence[Tensor], mode: int, lead: int) -> Tensor:
    """What is left for one mode once all others are multiplied in: ``(groups, size, rank)``."""
    remaining = [m for m in range(len(factors)) if m != lead]
    out = contracted
    for m in reversed(remaining):
        if m != mode:
            at = 1 + remaining.index(m)
            shape = [1] * out.dim()
            shape[0], shape[at], shape[-1] = len(out), factors[m].shape[1], factors[m].shape[2]
            out = (out * factors[m].reshape(shape)).sum(at)
            remaining.remove(m)
    return out


def _solve(product_GNR: Tensor, factors: Sequence[Tensor], mode: int, penalty_G: Tensor) -> Tensor:
    gram = torch.ones(1, 1, 1, dtype=product_GNR.dtype, device=product_GNR.device)
    for m, f in enumerate(factors):
        if m != mode:
            gram = gram * (f.transpose(1, 2) @ f)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    added = penalty_G[:, None] + 1e-12 * diagonal.mean(1, keepdim=True) + 1e-30
    gram = gram + torch.diag_embed(added.expand_as(diagonal))
    return torch.linalg.solve(gram, product_GNR, left=False)


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    out = factors[0]
    for f in factors[1:]:
        out = (out[:, :, None] * f[:, None]).flatten(1, 2)
    return out


def _even(factors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each term spread evenly over its vectors; a term of zeros stays as it is."""
    norms = torch.stack([f.norm(dim=1) for f in factors])
    mean = norms.clamp(min=1e-30).log().mean(0).exp()
    alive = (norms > 1e-30).all(0)
    return [torch.where(alive[:, None], f * (mean / n.clamp(min=1e-30))[:, None], f) for f, n in zip(factors, norms, strict=True)]


def _overlaps(factors: Sequence[Tensor]) -> Tensor:
    """Inner products of the terms: ``(groups, rank, rank)``."""
    gram = factors[0].transpose(1, 2) @ factors[0]
    for f in factors[1:]:
        gram = gram * (f.transpose(1, 2) @ f)
    return gram


def _exact(x: Tensor, rank: int) -> list[Tensor]:
    """One term for each position of all modes but the largest, whose vector is what lies there; terms beyond are zero."""
    sizes = x.shape[1:]
    lead = max(range(len(sizes)), key=lambda m: sizes[m])
    others = [m for m in range(len(sizes)) if m != lead]
    terms = prod(sizes) // sizes[lead]
    spare = rank - terms
    factors: list[Tensor] = [x] * len(sizes)
    factors[lead] = x.movedim(lead + 1, 1).flatten(2)
    repeat, tile = terms, 1
    for m in others:
        repeat //= sizes[m]
        eye = torch.eye(sizes[m], dtype=x.dtype, device=x.device)
        factors[m] = eye.repeat_interleave(repeat, 1).repeat(1, tile).expand(len(x), -1, -1)
        tile *= sizes[m]
    return [torch.cat([f, f.new_zeros(*f.shape[:2], spare)], 2) for f in factors]


def _fit(x: Tensor, factors: Sequence[Tensor], sweeps: int, converged: bool) -> CPFit:
    whole = compose(factors)
    size = float(x.norm())
    overlaps = _overlaps(factors)
    terms, together = float(overlaps.diagonal(dim1=1, dim2=2).sum()), float(whole.square().sum())
    error = float((x - whole).norm()) / size if size > 0 else 0.0
    return CPFit(tuple(_even(factors)), error, sweeps, converged, terms / together if together > 0 else 1.0)


def _gram(x: Tensor, mode: int) -> Tensor:
    rows = x.movedim(mode + 1, 1).flatten(2)
    return rows @ rows.transpose(1, 2)


def _along(x: Tensor, matrix_GNM: Tensor, mode: int) -> Tensor:
    """A tensor times a matrix along one mode."""
    moved = x.movedim(mode + 1, 1)
    return (matrix_GNM @ moved.flatten(2)).reshape(len(x), -1, *moved.shape[2:]).movedim(1, mode + 1)
