"""CP by alternating least squares against a plain implementation in NumPy, tensorly where it is installed, and tensors of known rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.errors import UsageError
from gossamer.lowrank import cp_als
from gossamer.lowrank.cp import compose


def outer(factors):
    """The sum of outer products, term by term."""
    terms = []
    for r in range(factors[0].shape[1]):
        term = np.ones(())
        for f in factors:
            term = np.multiply.outer(term, f[:, r])
        terms.append(term)
    return np.sum(terms, axis=0)


def plain_als(x, rank, sweeps, seed):
    """Alternating least squares by `numpy.linalg.lstsq` on full Khatri-Rao products: relative error."""
    rng = np.random.default_rng(seed)
    factors = [rng.normal(size=(n, rank)) for n in x.shape]
    for _ in range(sweeps):
        for m in range(x.ndim):
            rest = np.ones((1, rank))
            for n, f in enumerate(factors):
                if n != m:
                    rest = (rest[:, None] * f[None]).reshape(-1, rank)
            factors[m] = np.linalg.lstsq(rest, np.moveaxis(x, m, 0).reshape(x.shape[m], -1).T, rcond=None)[0].T
    made = outer(factors)
    return np.linalg.norm(made - x) / np.linalg.norm(x)


def low_rank(*sizes, rank=4, noise=0.0):
    factors = [torch.randn(1, n, rank, dtype=torch.float64) for n in sizes]
    x = compose(factors)
    return x + noise * x.std() * torch.randn(x.shape, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(20, 16, 3, 3), (12, 14, 5), (9, 7), (8, 6, 3, 3, 2)], ids=str)
def test_tensors_of_known_rank_are_found_and_factors_compose(sizes):
    x = low_rank(*sizes, noise=0.05)
    fit = cp_als(x, 4, sweeps=400, tolerance=1e-6, ridge=1e-4)
    assert fit.error < 0.06
    made = outer([f[0].numpy() for f in fit.factors])
    np.testing.assert_allclose(made, compose(fit.factors)[0].numpy(), atol=1e-9)
    assert fit.error == pytest.approx(np.linalg.norm(made - x[0].numpy()) / np.linalg.norm(x[0].numpy()), rel=1e-6)


def test_it_is_as_good_as_a_plain_implementation():
    torch.manual_seed(1)
    x = low_rank(16, 12, 3, 3, rank=20, noise=0.3)
    want = min(plain_als(x[0].numpy(), 10, 60, seed) for seed in range(3))
    assert cp_als(x, 10).error < 1.05 * want


def test_it_is_as_good_as_tensorly():
    tl = pytest.importorskip("tensorly")
    from tensorly.decomposition import parafac

    torch.manual_seed(1)
    x = low_rank(32, 24, 3, 3, rank=40, noise=0.3)
    found = tl.cp_to_tensor(parafac(x[0].numpy(), rank=16, init="random", random_state=0, n_iter_max=100))
    assert cp_als(x, 16).error < 1.05 * np.linalg.norm(found - x[0].numpy()) / float(x.norm())


def test_groups_are_independent():
    x = torch.cat([low_rank(9, 8, 3, rank=3), 100 * low_rank(9, 8, 3, rank=3), torch.zeros(1, 9, 8, 3, dtype=torch.float64)])
    fit = cp_als(x, 3, sweeps=300, tolerance=1e-7, ridge=1e-6)
    for a, b in zip(compose(fit.factors), x, strict=True):
        assert float((a - b).norm()) <= 0.02 * float(b.norm()) + 1e-9


def test_a_tensor_without_a_best_approximation_is_told_and_the_penalty_holds_it():
    """The sum of three terms that two approach ever more closely, the more they cancel."""
    a, b = torch.eye(2, dtype=torch.float64)
    x = sum(torch.einsum("i,j,k->ijk", *v) for v in ((a, a, b), (a, b, a), (b, a, a)))[None]
    free = cp_als(x, 2, sweeps=1000, tolerance=1e-9, ridge=0)
    assert free.degenerate
    held = cp_als(x, 2, sweeps=1000, tolerance=1e-9)
    assert not held.degenerate
    assert held.cancelling < 3
    assert free.error < held.error < 0.1


def test_it_stops_by_itself_tells_its_progress_and_repeats():
    x = low_rank(30, 20, 3, 3, rank=5, noise=0.1)
    seen = []
    fit = cp_als(x, 5, progress=lambda done, total: seen.append((done, total)))
    assert fit.converged
    assert 0 < fit.sweeps < 200
    assert seen == sorted(seen)
    assert all(total == seen[0][1] for _, total in seen)
    again = cp_als(x, 5)
    assert all(torch.equal(p, q) for p, q in zip(fit.factors, again.factors, strict=True))
    other = cp_als(x, 5, seed=1)
    assert not torch.equal(fit.factors[0], other.factors[0])
    assert not cp_als(x, 5, sweeps=3).converged


def test_bad_input_is_one_line():
    for x, rank in [(torch.zeros(3, 3), 1), (torch.zeros(1, 3, 3), 0), (torch.full((1, 3, 3), float("nan")), 1)]:
        with pytest.raises(UsageError, match="cp_als"):
            cp_als(x, rank)
