"""Losses of stand-ins against networks put together by hand, and the choice among several against every choice measured."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import nn

from gossamer.calibration import Divergence, alone, best_together, exchanged
from gossamer.sources.batches import Batch


@dataclass(frozen=True, eq=False)
class Stand:
    module: nn.Sequential
    missing: torch.Tensor
    shift: torch.Tensor | None
    error: float


def stand(layer, size, seed):
    """A layer whose weight and bias are a little off."""
    g = torch.Generator().manual_seed(seed)
    missing = size * torch.randn(layer.weight.shape, generator=g)
    shift = size * torch.randn(len(layer.weight), generator=g)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight -= missing
        twin.bias += shift
    return Stand(nn.Sequential(twin), missing[None], shift, size)


def case():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    data = [Batch((torch.randn(30, 6),), {}, None) for _ in range(3)]
    fits = {
        (n, o): (stand(net[int(n)], size, seed), stand(net[int(n)], 1.5 * size, seed + 10))
        for seed, n in enumerate(("0", "2"))
        for o, size in (("mild", 0.03), ("severe", 0.2))
    }
    return net, {n: net[int(n)] for n in ("0", "2")}, data, fits


def by_hand(net, data, picks):
    """Kullback-Leibler divergence in NumPy: even batches with the first stand-in of each pair, odd ones with the second."""
    total = 0.0
    for i, batch in enumerate(data):
        changed = nn.Sequential(*net)
        for n, pair in picks.items():
            changed[int(n)] = pair[i % 2].module
        with torch.no_grad():
            p, q = (log_softmax(m(batch.args[0]).double().numpy(), 1) for m in (net, changed))
        total += float((np.exp(p) * (p - q)).sum())
    return total / sum(len(b.args[0]) for b in data)


@pytest.mark.parametrize("limit", [2**29, 1])
def test_each_alone(limit, monkeypatch):
    monkeypatch.setattr("gossamer.calibration.judging.HELD_BYTES", limit)
    net, layers, data, fits = case()
    far, steps = Divergence(net, data, samples=90), []
    found = alone(net, layers, ((*key, pair) for key, pair in fits.items()), far, macs=1.0, step=lambda: steps.append(1))
    for (n, o), pair in fits.items():
        assert found[n][o] == pytest.approx(by_hand(net, data, {n: pair}), rel=1e-4)
    assert len(steps) == 8
    told = alone(net, layers, ((*key, pair) for key, pair in fits.items()), far, macs=1e12)
    for (n, o), pair in fits.items():
        assert told[n][o] != found[n][o]
        assert told[n][o] == pytest.approx(by_hand(net, data, {n: pair}), rel=0.3 if o == "mild" else 0.8)
    plain = alone(net, layers, ((*key, pair) for key, pair in fits.items()), None, macs=1.0)
    assert plain["2"] == {"mild": pytest.approx(0.03**2), "severe": pytest.approx(0.2**2)}


def test_layers_that_no_gradient_reaches_are_measured():
    net, layers, data, fits = case()

    class Rounded(nn.Module):
        def forward(self, x):
            return (8 * x).round() / 8

    net[1] = Rounded()
    far = Divergence(net, data, samples=90)
    told = alone(net, layers, ((*key, pair) for key, pair in fits.items()), far, macs=1e12)
    assert told["0"]["severe"] == pytest.approx(by_hand(net, data, {"0": fits["0", "severe"]}), rel=1e-4)
    assert told["2"]["mild"] != pytest.approx(by_hand(net, data, {"2": fits["2", "mild"]}), rel=1e-4)


def test_the_best_together_is_the_least_of_all_measured_by_hand():
    net, layers, data, fits = case()
    far = Divergence(net, data, samples=90)
    asked = []

    def fit(wanted, apart):
        asked.append((wanted, apart))
        return ((n, o, fits[n, o] if apart else (fits[n, o][0],) * 2) for n, own in wanted.items() for o in own)

    candidates = [{"0": "severe"}, {"2": "severe"}, {"0": "mild", "2": "severe"}, {"2": "severe"}, {"0": "mild", "2": "mild"}]
    hand = [by_hand(net, data, {n: fits[n, o] for n, o in c.items()}) for c in candidates]
    for some in ([0, 1], [0, 1, 2, 3], [2, 4, 0]):
        asked.clear()
        best, found = best_together(net, layers, [candidates[i] for i in some], fit, far)
        assert best == candidates[min(some, key=lambda i: hand[i])]
        assert {n: f.module for n, f in found.items()} == {n: fits[n, o][0].module for n, o in best.items()}
        assert [apart for _, apart in asked] == [True, False]
    assert best_together(net, layers, candidates, fit, None)[0] == candidates[0]


def test_layers_are_put_back_whatever_happens():
    net, _, _, fits = case()
    before = list(net)
    one = fits["0", "mild"][0].module
    with exchanged(net, {net[0]: one, net[4]: nn.Identity()}) as changed:
        assert changed[0] is one
    assert list(net) == before

    def fail():
        with exchanged(net, {net[0]: one}):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(net) == before
    with exchanged(before[0], {before[0]: one}) as changed:
        assert changed is one
