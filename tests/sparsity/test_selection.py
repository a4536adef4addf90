"""Masks against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from gossamer.errors import UsageError
from gossamer.sparsity import Pattern, select


def best_of(score: np.ndarray, keep: int) -> float:
    return max(sum(c) for c in itertools.combinations(score.reshape(-1), keep))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.75, 0.99])
def test_a_layer_keeps_the_best_sum_of_scores(sparsity):
    score = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    kept = select({"w": score}, sparsity=sparsity)["w"]
    keep = 12 - round(sparsity * 12)
    assert int(kept.sum()) == keep
    assert float(score[kept].sum()) == pytest.approx(best_of(score.numpy(), keep), abs=1e-6)


def test_global_rows_and_counts():
    g = torch.Generator().manual_seed(1)
    scores = {"a": torch.rand(2, 3, generator=g), "b": 5 * torch.rand(4, 1, generator=g)}
    kept = select(scores, keep=4, scope="global")
    together = torch.cat([s.reshape(-1) for s in scores.values()])
    assert sum(int(k.sum()) for k in kept.values()) == 4
    assert sum(float(scores[n][k].sum()) for n, k in kept.items()) == pytest.approx(float(together.topk(4).values.sum()), abs=1e-6)
    rows = select(scores, keep=1, scope="row")
    assert torch.equal(rows["a"].float().argmax(1), scores["a"].argmax(1))
    assert rows["a"].sum(1).tolist() == [1, 1]
    assert bool(rows["b"].all())


def test_ties_go_to_the_first_and_all_or_nothing_is_allowed():
    ones = {"w": torch.ones(2, 4)}
    assert select(ones, sparsity=0.5)["w"].tolist() == [[True] * 4, [False] * 4]
    assert bool(select(ones, keep=100)["w"].all())
    assert not bool(select(ones, keep=0)["w"].any())


def test_patterns_against_brute_force():
    score = torch.rand(4, 8, 3, generator=torch.Generator().manual_seed(2))
    kept = select({"w": score}, pattern=Pattern.parse("2:4"))["w"]
    for o, i, k in itertools.product(range(4), (0, 4), range(3)):
        group, mask = score[o, i : i + 4, k], kept[o, i : i + 4, k]
        assert int(mask.sum()) == 2
        assert float(group[mask].sum()) == pytest.approx(best_of(group.numpy(), 2), abs=1e-6)
    blocks = select({"w": score}, sparsity=0.5, pattern=Pattern.parse("2x6"))["w"].reshape(2, 2, 4, 6)
    sums = score.reshape(2, 2, 4, 6).sum((1, 3))
    whole = blocks.all(3).all(1)
    assert torch.equal(whole, blocks.any(3).any(1))
    assert int(whole.sum()) == 4
    assert float(sums[whole].sum()) == pytest.approx(best_of(sums.numpy(), 4), abs=1e-5)


@pytest.mark.parametrize("text", ["4:2", "0:4", "2-4", "1x1", "two"])
def test_a_pattern_that_is_none_says_what_one_is(text):
    with pytest.raises(UsageError, match="2:4"):
        Pattern.parse(text)


def test_scores_that_are_not_finite_are_named():
    with pytest.raises(UsageError, match="w: 1 of 2 scores are NaN"):
        select({"w": torch.tensor([1.0, float("nan")])}, sparsity=0.5)
    with pytest.raises(UsageError, match="known are layer, global, row"):
        select({"w": torch.ones(2)}, sparsity=0.5, scope="rows")
