"""Projections against brute force over all supports and against scipy's constrained solver."""

from __future__ import annotations

from itertools import combinations
from time import process_time

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from gossamer.errors import UsageError
from gossamer.projections import block_project, l0_project, l1_project, nm_project


@pytest.mark.parametrize("k", range(8))
def test_l0_equals_brute_force(k):
    w = torch.randn(7, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    got = l0_project(w, k)
    least = min(float(w.square().sum() - w[list(s)].square().sum()) for s in combinations(range(7), k))
    assert int(got.count_nonzero()) <= k
    assert float((got - w).square().sum()) == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("radius", [0.0, 0.1, 1.0, 2.5, 50.0])
def test_l1_equals_scipys_solver(radius):
    w = np.random.default_rng(3).normal(size=6)
    # w = p - q with p, q >= 0 makes the ball a linear constraint
    want = minimize(
        lambda x: ((x[:6] - x[6:] - w) ** 2).sum(),
        np.zeros(12),
        jac=lambda x: np.concatenate([2 * (x[:6] - x[6:] - w), -2 * (x[:6] - x[6:] - w)]),
        bounds=[(0, None)] * 12,
        constraints={"type": "ineq", "fun": lambda x: radius - x.sum(), "jac": lambda x: -np.ones(12)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    ).x
    got = l1_project(torch.from_numpy(w), radius)
    assert float(got.abs().sum()) <= radius + 1e-12
    np.testing.assert_allclose(got.numpy(), want[:6] - want[6:], atol=1e-5)


def test_l1_of_a_long_vector_meets_the_optimality_conditions():
    w = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = l1_project(w, 30.0)
    shrunk = (w - got).abs()
    theta = shrunk[got != 0]
    assert float(got.abs().sum()) == pytest.approx(30.0)
    assert float(theta.max() - theta.min()) < 1e-12
    assert float(w.abs()[got == 0].max()) <= float(theta.max()) + 1e-12


@pytest.mark.parametrize("project", [lambda w, d: l0_project(w, 3, dim=d), lambda w, d: l1_project(w, 1.5, dim=d)])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_rows_equal_each_slice_on_its_own(project, dim):
    w = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = torch.stack([project(s, None) for s in w.unbind(dim)], dim)
    torch.testing.assert_close(project(w, dim), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("project", [lambda w: l0_project(w, 5), lambda w: l1_project(w, 2.0)])
def test_several_tensors_equal_their_concatenation(project):
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(3, 4, generator=g), torch.randn(6, generator=g)
    got = project([a, b])
    assert [t.shape for t in got] == [a.shape, b.shape]
    assert torch.equal(torch.cat([t.flatten() for t in got]), project(torch.cat([a.flatten(), b])))


def test_ties_keep_the_lowest_index():
    assert l0_project(torch.tensor([1.0, -1.0, 1.0, 1.0]), 2).tolist() == [1.0, -1.0, 0.0, 0.0]
    assert l0_project(torch.full((2, 4), 2.0), 1, dim=0).tolist() == [[2.0, 0, 0, 0]] * 2


def test_the_edges():
    w = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    assert not l0_project(w, 0).any() and not l1_project(w, 0).any() and not l1_project(w, 0, dim=0).any()
    for same in (l0_project(w, 4), l0_project(w, 99), l1_project(w, 6.0), l1_project(w, 100)):
        assert torch.equal(same, w) and same.data_ptr() != w.data_ptr()
    zeros = torch.zeros(5)
    assert torch.equal(l0_project(zeros, 2), zeros) and torch.equal(l1_project(zeros, 0), zeros)
    assert l0_project(torch.zeros(0), 3).shape == l1_project(torch.zeros(0), 1.0).shape == (0,)
    assert l0_project(w.bfloat16(), 1).dtype == l1_project(w.bfloat16(), 1.0).dtype == torch.bfloat16


def test_nm_and_blocks_equal_brute_force():
    w = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    got = nm_project(w, 2, 4)
    for o, g, y, x in np.ndindex(4, 2, 3, 3):
        part, kept = w[o, 4 * g : 4 * g + 4, y, x], got[o, 4 * g : 4 * g + 4, y, x]
        assert float(kept.square().sum()) == pytest.approx(max(float(part[list(s)].square().sum()) for s in combinations(range(4), 2)))
        assert int(kept.count_nonzero()) == 2
    m = w[:, :2, 0, 0]
    blocks = [(r, c) for r in (0, 2) for c in (0, 1)]
    best = max(sum(float(m[r : r + 2, c].square().sum()) for r, c in s) for s in combinations(blocks, 2))
    assert float(block_project(m, 2, (2, 1)).square().sum()) == pytest.approx(best)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error(bad):
    w = torch.tensor([[1.0, bad]])
    for call in (lambda: l0_project(w, 1), lambda: l1_project([w], 1.0), lambda: nm_project(w, 1, 2), lambda: block_project(w, 1, (1, 1))):
        with pytest.raises(UsageError, match="1 of 2 weights are NaN or infinite"):
            call()


def test_bad_arguments_are_one_line():
    w = torch.ones(2, 3)
    for call, text in [
        (lambda: l0_project(w, -1), "k is -1"),
        (lambda: l0_project(w, 1.5), "k is 1.5"),
        (lambda: l1_project(w, float("nan")), "radius is nan"),
        (lambda: l0_project(w.long(), 1), "torch.int64"),
        (lambda: l0_project(w, 1, dim=2), "no dimension 2"),
        (lambda: l0_project([w], 1, dim=0), "not with a sequence"),
        (lambda: l1_project([], 1.0), "no tensors"),
        (lambda: nm_project(w, 2, 4), "not a multiple of m=4"),
        (lambda: block_project(w, 1, (2, 2)), "do not divide"),
    ]:
        with pytest.raises(UsageError, match=text):
            call()


@pytest.mark.slow
def test_ten_million_weights_take_less_than_a_second():
    w = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    for project in (lambda: l0_project(w, 1_000_000), lambda: l1_project(w, 1e5), lambda: l1_project(w, 7e6)):
        start = process_time()
        project()
        assert process_time() - start < 1.0


@pytest.mark.parametrize("tail", ["normal", "one giant", "all where a sample does not look", "equal"])
@pytest.mark.parametrize("part", [1e-4, 0.1, 0.5, 0.99])
def test_l1_of_long_vectors_equals_sorting_in_double_precision(tail, part):
    n = 300_000
    w = torch.randn(n, generator=torch.Generator().manual_seed(0))
    if tail == "one giant":
        w[12345] = 1e6
    elif tail == "all where a sample does not look":
        w[::4] = 0
    elif tail == "equal":
        w = torch.ones(n)
    a = np.sort(np.abs(w.double().numpy()))[::-1]
    radius = part * a.sum()
    sums = np.cumsum(a)
    k = np.nonzero(a > (sums - radius) / np.arange(1, n + 1))[0][-1]
    theta = (sums[k] - radius) / (k + 1)
    want = np.sign(w.double().numpy()) * np.maximum(np.abs(w.double().numpy()) - theta, 0)
    np.testing.assert_allclose(l1_project(w, float(radius)).double().numpy(), want, rtol=1e-5, atol=2e-6 * max(1.0, theta))
