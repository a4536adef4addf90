"""One-dimensional k-means: exact by dynamic programming, vectorised level by level."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gossamer.errors import UsageError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EXACT = 16_384
"""Distinct values up to which the result is a global optimum."""
_BINS, _BINS_A_VALUE = 4096, 32  # of what is beyond: at least so many, and so many for each value of the codebook
_STEPS = 10_000


def kmeans_1d(values: ArrayLike, k: int, *, weights: ArrayLike | None = None) -> tuple[Floats, float]:
    """The ``k`` centroids with the least sum of squared distances from each value to its nearest centroid.

    Up to 16,384 distinct values this is a global optimum: optimal clusters are intervals, and dynamic programming over the sorted values
    finds them all. Beyond, at least 32 bins for each centroid stand for the values, denser where an optimal codebook is; their optimum is
    the start of Lloyd's iteration on all values, which runs to its fixed point. The same values give the same centroids.

    Examples:
        >>> kmeans_1d([1.0, 2.0, 10.0, 11.0, 12.0], 2)
        (array([ 1.5, 11. ]), 2.5)

    Args:
        values: numbers, in any order and shape.
        k: centroids, at least 1.
        weights: multiplicity of each value, at least 0; values of weight 0 do not count. Default: 1 each.

    Returns:
        The centroids, ascending (the distinct values themselves where there are no more than ``k``), and the cost.

    Raises:
        UsageError: no values, NaN or infinity, ``k < 1``, or weights that do not fit.

    Source: Wu, "Optimal quantization by matrix searching", Journal of Algorithms 12 (1991), for the monotone optima; Lloyd, IEEE
    Transactions on Information Theory 28 (1982); Panter and Dite, Proceedings of the IRE 39 (1951), for the density of the bins.
    """
    if not isinstance(k, int) or k < 1:
        raise UsageError(f"k={k!r}: k-means needs an integer of at least 1")
    x, w = _distinct(values, weights)
    if k >= len(x):
        return x, 0.0
    exponent = int(np.frexp(np.abs(x).max())[1])
    scaled = np.ldexp(x, -exponent)  # a power of two changes no digit, and squares stay within range
    centre = float(scaled @ (w / w.sum()))
    scaled -= centre
    sums = _prefix_sums(scaled, w)
    if len(x) <= EXACT:
        ends = _optimal_ends(sums, k)
    else:
        bins = _bin_ends(scaled, w, max(_BINS, _BINS_A_VALUE * k))
        ends = bins[_optimal_ends(sums[:, np.concatenate([[0], bins])], k) - 1]
    centroids, ends = _lloyd(scaled, sums, ends)
    centroids = _means(scaled, w, ends)
    cost = float(w @ (scaled - np.repeat(centroids, np.diff(ends, prepend=0))) ** 2)
    return np.ldexp(centroids + centre, exponent), float(np.ldexp(cost, 2 * exponent))


def _distinct(values: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats]:
    """Ascending distinct values and how much each weighs."""
    x = np.asarray(values, dtype=np.float64).ravel()
    if weights is None:
        x = np.sort(x)
    else:
        w = np.asarray(weights, dtype=np.float64).ravel()
        if w.shape != x.shape or not np.isfinite(w).all() or (w < 0).any():
            raise UsageError(f"{w.size} weights for {x.size} values: give one for each, finite and at least 0")
        x = x[w > 0]
        order = np.argsort(x, kind="stable")
        x, w = x[order], w[w > 0][order]
    if not len(x):
        raise UsageError("k-means needs at least one value")
    if not np.isfinite(x).all():
        raise UsageError(f"k-means needs finite values, and {int((~np.isfinite(x)).sum())} of {len(x)} are NaN or infinity")
    first = np.flatnonzero(np.concatenate([[True], x[1:] != x[:-1]]))
    counts = np.diff(first, append=len(x)).astype(np.float64) if weights is None else np.add.reduceat(w, first)
    return x[first], counts


def _prefix_sums(x: Floats, w: Floats) -> Floats:
    """Weights and weighted values of the first n values, for n from 0: shape (2, n + 1)."""
    out = np.zeros((2, len(x) + 1))
    np.cumsum(w, out=out[0, 1:])
    np.cumsum(w * x, out=out[1, 1:])
    return out


def _optimal_ends(sums: Floats, k: int) -> Ints:
    """Where each of ``k`` optimal clusters ends, exclusively, as counts of values.

    With the sum of all squares taken away, a cluster of values i to j costs ``-(sum of wx)^2 / (sum of w)``. ``best[j]`` is the least cost
    of the first j values in m clusters; where its last cluster begins grows with j, and with m, so the optima of every second j bound
    those between them.
    """
    (w, wx), n = sums, sums.shape[1] - 1
    best = np.full(n + 1, np.inf)
    best[1:] = -(wx[1:] ** 2) / w[1:]
    begins = np.zeros((k, n + 1), dtype=np.int32)
    for m in range(2, k + 1):
        before, begin, best = best, begins[m - 1], np.full(n + 1, np.inf)
        begin[:m] = m - 1
        step = 1 << (n.bit_length() - 1)
        while step and m < k:
            js = np.arange(step, n + 1, 2 * step)
            js = js[js >= m]
            low = np.maximum(begin[js - step], begins[m - 2, js])
            high = np.where(js + step <= n, begin[np.minimum(js + step, n)], n)
            best[js], begin[js] = _least(before, w, wx, js, low, high)
            step >>= 1
        if m == k:  # only the whole is wanted
            js = np.array([n])
            _, begin[js] = _least(before, w, wx, js, np.maximum(begins[m - 2, js], m - 1), js)
    ends = np.empty(k, dtype=np.int64)
    end = n
    for m in range(k, 0, -1):
        ends[m - 1] = end
        end = int(begins[m - 1, end])
    return ends


def _least(before: Floats, w: Floats, wx: Floats, js: Ints, low: Ints, high: Ints) -> tuple[Floats, Ints]:
    """For each j the least cost over all begins from ``low`` to ``high`` inclusive, and the first begin that reaches it."""
    if not len(js):
        return np.zeros(0), js
    high = np.minimum(high, js - 1)
    low = np.minimum(low, high)
    counts = high - low + 1
    starts = np.cumsum(counts) - counts
    i = np.arange(int(counts.sum())) + np.repeat(low - starts, counts)
    cost = np.repeat(wx[js], counts)
    cost -= wx[i]
    cost *= cost
    weight = np.repeat(w[js], counts)
    weight -= w[i]
    cost /= weight
    np.subtract(before[i], cost, out=cost)
    least = np.minimum.reduceat(cost, starts)
    hits = np.flatnonzero(cost == np.repeat(least, counts))
    return least, i[hits[np.searchsorted(hits, starts)]]


def _bin_ends(x: Floats, w: Floats, bins: int) -> Ints:
    """Ends of bins of sorted values, exclusive, about as dense as an optimal codebook: as the cube root of the values' density."""
    total = np.cumsum(w)
    fine = np.unique(np.searchsorted(total, np.linspace(0, total[-1], 4 * bins + 1)[1:-1]))
    fine = np.unique(np.concatenate([[0], fine, [len(x) - 1]]))
    mass, width = np.diff(total[fine]), np.diff(x[fine])
    share = np.concatenate([[0], np.cumsum(np.cbrt(mass * width**2))])
    edges = np.interp(np.linspace(0, share[-1], bins + 1)[1:], share, x[fine])
    return np.unique(np.append(np.searchsorted(x, edges, side="right"), len(x)))


def _lloyd(x: Floats, sums: Floats, ends: Ints) -> tuple[Floats, Ints]:
    """Lloyd's iteration to its fixed point: a value halfway between two centroids goes to the lower. Clusters that become empty vanish."""
    for _ in range(_STEPS):
        w, wx = np.diff(sums[:, ends], prepend=0.0)
        centroids = wx / w
        halfway = (centroids[1:] + centroids[:-1]) / 2
        new = np.append(np.searchsorted(x, halfway, side="right"), len(x))
        new = new[np.diff(new, prepend=0) > 0]
        if len(new) == len(ends) and (new == ends).all():
            break
        ends = new
    return centroids, ends


def _means(x: Floats, w: Floats, ends: Ints) -> Floats:
    """Means of clusters, summed one by one: differences of long prefix sums would lose digits."""
    begins = np.concatenate([[0], ends[:-1]])
    return np.add.reduceat(w * x, begins) / np.add.reduceat(w, begins)
