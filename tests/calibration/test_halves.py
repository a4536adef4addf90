"""Moments of every other batch against those of the batches picked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.calibration import Halves, second_moments
from gossamer.sources.batches import Batch


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()


def batches(n):
    g = torch.Generator().manual_seed(1)
    return [Batch((torch.randn(4, 3, 6, 6, generator=g),), {}, None) for _ in range(n)]


def same(a, b):
    torch.testing.assert_close((a.mean, a.scatter), (b.mean, b.scatter), atol=1e-4, rtol=1e-4)
    assert a.n == b.n


@pytest.mark.parametrize("limit", [2**29, 1])
def test_halves_are_judged_on_each_other_where_moments_are_few(limit, monkeypatch):
    monkeypatch.setattr("gossamer.calibration.moments.HELD_BYTES", limit)  # all layers in one sweep, or each in its own
    model, data = net(), batches(5)
    layers = {n: model[int(n)] for n in ("0", "2", "4")}
    whole, even, odd = (second_moments(model, layers, d) for d in (data, data[::2], data[1::2]))
    halves = Halves(model, layers, data)
    for _ in range(2):
        found = dict(halves.of(["4", "0"], apart=True))
        assert list(found) == ["4", "0"]
        same(found["4"][0], odd["4"])  # 20 rows of 128 inputs
        same(found["4"][1], even["4"])
        assert len(found["0"]) == 2  # 320 positions of 27
        (everything,) = dict(halves.of(["4"]))["4"]
        same(everything, whole["4"])
        (enough,) = dict(halves.of(["2"], apart=True))["2"]  # 320 positions of 8
        same(enough, whole["2"])


def test_without_a_second_batch_without_data_and_with_too_many_inputs(monkeypatch):
    model = net()
    layers = {n: model[int(n)] for n in ("0", "4")}
    (one,) = dict(Halves(model, layers, batches(1)).of(["4"], apart=True))["4"]
    same(one, second_moments(model, layers, batches(1))["4"])
    assert list(Halves(model, layers, None).of(["4", "0"], apart=True)) == [("4", (None,)), ("0", (None,))]
    monkeypatch.setattr("gossamer.calibration.halves.MOST_INPUTS", 100)
    found = list(Halves(model, layers, batches(2)).of(["4", "0"], apart=True))
    assert [(n, len(m), m[0] is None) for n, m in found] == [("0", 2, False), ("4", 1, True)]
