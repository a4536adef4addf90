"""Exact k-means against brute force over all partitions, scikit-learn with many restarts, and its own fixed point."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gossamer.errors import UsageError
from gossamer.sharing import kmeans_1d
from gossamer.sharing.kmeans import EXACT

DRAW = {
    "normal": lambda rng, n: rng.normal(size=n),
    "integers": lambda rng, n: rng.integers(-4, 5, n).astype(float),
    "heavy tails": lambda rng, n: rng.standard_cauchy(n),
    "far from zero": lambda rng, n: 1e6 + rng.random(n),
    "tiny": lambda rng, n: 1e-180 * rng.random(n),
}


def partition_cost(x, w, ends):
    """Sum of weighted squared distances to the means of the intervals that end there."""
    total = 0.0
    for a, b in itertools.pairwise((0, *ends, len(x))):
        mean = np.average(x[a:b], weights=w[a:b])
        total += float(w[a:b] @ (x[a:b] - mean) ** 2)
    return total


def nearest_cost(x, centroids):
    return float((np.abs(x[:, None] - centroids).min(1) ** 2).sum())


@pytest.mark.parametrize("kind", DRAW)
def test_the_cost_is_that_of_the_best_of_all_partitions(kind):
    rng = np.random.default_rng(1)
    for _ in range(25):
        values = DRAW[kind](rng, int(rng.integers(2, 11)))
        weights = rng.integers(1, 6, len(values)).astype(float)
        x, inverse = np.unique(values, return_inverse=True)
        w = np.bincount(inverse, weights)
        for k in range(1, len(x)):
            best = min(partition_cost(x, w, ends) for ends in itertools.combinations(range(1, len(x)), k - 1))
            centroids, cost = kmeans_1d(values, k, weights=weights)
            assert cost == pytest.approx(best, rel=1e-7)
            assert len(centroids) == k and (np.diff(centroids) > 0).all()


def test_as_many_centroids_as_values_are_the_values():
    centroids, cost = kmeans_1d([3.0, 0.1, 3.0, -2.5], 3)
    assert centroids.tolist() == [-2.5, 0.1, 3.0] and cost == 0
    assert kmeans_1d([0.1, 0.1], 16)[0].tolist() == [0.1]


def test_multiplicities_count_as_repeated_values():
    rng = np.random.default_rng(2)
    x, n = rng.normal(size=200), rng.integers(0, 5, 200)
    assert np.allclose(kmeans_1d(x, 7, weights=n)[0], kmeans_1d(np.repeat(x, n), 7)[0], rtol=1e-12)


@pytest.mark.parametrize(("kind", "n", "k"), [("normal", 3000, 16), ("heavy tails", 500, 8), ("integers", 1000, 4), ("normal", 30_000, 8)])
def test_scikit_learn_with_many_restarts_is_never_better(kind, n, k):
    cluster = pytest.importorskip("sklearn.cluster")
    x = DRAW[kind](np.random.default_rng(3), n)
    theirs = cluster.KMeans(k, n_init=20, random_state=0).fit(x[:, None]).inertia_
    centroids, cost = kmeans_1d(x, k)
    assert cost <= theirs * (1 + 1e-6 if n > EXACT else 1 + 1e-12)
    assert cost == pytest.approx(nearest_cost(x, centroids), rel=1e-9)


@pytest.mark.parametrize("k", [4, 16, 256])
@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
def test_many_values_end_in_lloyds_fixed_point(kind, k):
    x = DRAW[kind](np.random.default_rng(4), 100_000).astype(np.float32)
    centroids, cost = kmeans_1d(x, k)
    x = np.sort(x.astype(np.float64))
    label = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, x, side="left")
    means = np.bincount(label, x) / np.bincount(label)
    assert len(centroids) == k
    assert np.allclose(means, centroids, rtol=1e-9, atol=1e-9 * x.std() if kind == "normal" else 1e-9)
    assert cost == pytest.approx(float(((x - centroids[label]) ** 2).sum()), rel=1e-9)


def test_beyond_the_exact_size_little_is_lost():
    x = np.random.default_rng(5).standard_t(3, size=EXACT)
    exact = kmeans_1d(x, 64)[1]
    doubled = np.concatenate([x, x + 1e-9])  # twice as many distinct values, the same shape
    assert kmeans_1d(doubled, 64)[1] / 2 == pytest.approx(exact, rel=1e-4)


def test_the_same_values_in_another_order_give_the_same_centroids():
    rng = np.random.default_rng(6)
    x = rng.normal(size=50_000)
    assert (kmeans_1d(x, 16)[0] == kmeans_1d(rng.permutation(x), 16)[0]).all()


@pytest.mark.parametrize(
    ("values", "k", "weights", "words"),
    [
        ([1.0, float("nan")], 2, None, "1 of 2 are NaN"),
        ([1.0, float("inf")], 2, None, "1 of 2 are NaN or infinity"),
        ([], 2, None, "at least one value"),
        ([1.0], 0, None, "k=0"),
        ([1.0, 2.0], 1, [1.0], "1 weights for 2 values"),
        ([1.0, 2.0], 1, [1.0, -1.0], "at least 0"),
    ],
)
def test_bad_input_is_one_line(values, k, weights, words):
    with pytest.raises(UsageError, match=words):
        kmeans_1d(values, k, weights=weights)
