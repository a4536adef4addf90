"""The knapsack against brute force over every combination."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gossamer.errors import BudgetError, UsageError
from gossamer.search import knapsack, monotone
from gossamer.search.knapsack import _priced, _undominated


def brute(costs, losses, budget):
    """Least total loss within the budget, every combination tried."""
    return min(
        sum(x[i] for x, i in zip(losses, picks, strict=True))
        for picks in itertools.product(*(range(len(c)) for c in costs))
        if sum(c[i] for c, i in zip(costs, picks, strict=True)) <= budget
    )


def problem(seed):
    """Random options, not ordered, of different numbers; some losses equal, some zero."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, size=rng.integers(1, 7))
    scale = 10.0 ** rng.integers(-6, 9)
    costs = [(rng.integers(0, 30, n) * scale).tolist() for n in sizes]
    losses = [(np.round(rng.random(n), 1) * 10.0 ** rng.integers(-6, 3)).tolist() for n in sizes]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    return costs, losses, least + (most - least) * float(rng.random())


@pytest.mark.parametrize("seed", range(60))
def test_the_least_loss_within_the_budget(seed):
    costs, losses, budget = problem(seed)
    picks = knapsack(costs, losses, budget)
    assert sum(c[i] for c, i in zip(costs, picks, strict=True)) <= budget * (1 + 1e-9)
    assert sum(x[i] for x, i in zip(losses, picks, strict=True)) == pytest.approx(brute(costs, losses, budget), rel=1e-5, abs=1e-12)
    assert picks == knapsack(costs, losses, budget)


def test_prices_alone_stay_within_the_budget_and_lose_at_most_one_item_more():
    tried = 0
    for seed in range(60):
        costs, losses, budget = problem(seed)
        live = [_undominated(np.array(c), np.array(x)) for c, x in zip(costs, losses, strict=True)]
        prices = [np.array(c)[i] for c, i in zip(costs, live, strict=True)]
        harms = [np.array(x)[i] for x, i in zip(losses, live, strict=True)]
        if sum(p[-1] for p in prices) <= budget:
            continue
        picks = _priced(prices, harms, budget)
        assert sum(p[i] for p, i in zip(prices, picks, strict=True)) <= budget
        lost = sum(h[i] for h, i in zip(harms, picks, strict=True))
        assert lost <= brute(costs, losses, budget) + max(float(np.ptp(h)) for h in harms) + 1e-9
        tried += 1
    assert tried > 20


def test_three_hundred_layers_of_thirty_two_options(capfd):
    rng = np.random.default_rng(0)
    costs = np.sort(rng.random((300, 32)), 1).tolist()
    losses = np.sort(rng.random((300, 32)), 1)[:, ::-1].tolist()
    budget = 0.4 * 300
    picks = knapsack(costs, losses, budget)
    assert sum(c[i] for c, i in zip(costs, picks, strict=True)) <= budget * (1 + 1e-9)
    bound = lagrange_bound(np.array(costs), np.array(losses), budget)
    assert bound - 1e-9 <= sum(x[i] for x, i in zip(losses, picks, strict=True)) <= bound * 1.001
    assert capfd.readouterr().out == ""


def lagrange_bound(costs, losses, budget):
    """A lower bound: the best of the relaxed problem over many prices."""
    return max((losses + price * costs).min(1).sum() - price * budget for price in np.linspace(0, 50, 5001))


def test_a_looser_budget_never_loses_more_where_losses_are_monotone():
    rng = np.random.default_rng(3)
    costs = [[8.0, 6.0, 4.0, 2.0]] * 6
    losses = [monotone(rng.normal(0.1, 0.3, 4) * [0, 1, 2, 3]) for _ in range(6)]
    lost = [sum(x[i] for x, i in zip(losses, knapsack(costs, losses, b), strict=True)) for b in range(12, 49)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(lost))
    assert lost[-1] == 0


def test_negative_losses_are_noise():
    assert knapsack([[4, 1]], [[0.0, -5.0]], 4) == [1]
    assert knapsack([[4, 1], [4, 1]], [[0.0, -5.0], [0.0, 1.0]], 5) == [1, 0]
    assert monotone([0.3, -1.0, 0.2]) == [0.3, 0.3, 0.3]


def test_budgets_that_cannot_be_met_and_bad_numbers_are_one_line():
    with pytest.raises(BudgetError, match="a latency of 2 cannot be reached: the cheapest options together come to 3"):
        knapsack([[2, 4], [1, 5]], [[1, 0], [1, 0]], 2, what="latency")
    for costs, losses in [([], []), ([[]], [[]]), ([[1.0]], [[1.0, 2.0]]), ([[-1.0]], [[0.0]]), ([[1.0]], [[float("nan")]])]:
        with pytest.raises(UsageError):
            knapsack(costs, losses, 5)
