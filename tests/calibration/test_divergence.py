"""Distances of outputs against SciPy and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn

from gossamer.calibration import Divergence
from gossamer.errors import UsageError
from gossamer.sources.batches import Batch


def test_logits_by_their_divergence_and_all_else_by_relative_error():
    x = torch.randn(30, 5)
    a, b = nn.Linear(5, 4), nn.Linear(5, 4)
    far = Divergence(a, [Batch((x[:20],), {}, None), Batch((x[20:],), {}, None)])
    with torch.no_grad():
        p, q = (softmax(m(x).double().numpy(), 1) for m in (a, b))
    assert far(b) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert far(a) == 0
    maps = torch.randn(6, 3, 8, 8)
    c, d = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)
    with torch.no_grad():
        u, v = c(maps).numpy(), d(maps).numpy()
    assert Divergence(c, [Batch((maps,), {}, None)])(d) == pytest.approx(((u - v) ** 2).mean() / u.var(), rel=1e-4)


def test_as_many_samples_as_asked_for_and_outputs_that_are_not_finite(monkeypatch):
    seen = []

    def batches():
        for i in range(100):
            seen.append(i)
            yield Batch((torch.randn(10, 5),), {}, None)

    far = Divergence(nn.Linear(5, 3), batches(), samples=25)
    assert len(seen) == 3
    with monkeypatch.context() as m:
        m.setattr("gossamer.calibration.divergence.HELD_BYTES", 100)
        seen.clear()
        Divergence(nn.Linear(5, 3), batches(), samples=25)
        assert len(seen) == 1
    broken = nn.Linear(5, 3)
    nn.init.constant_(broken.weight, float("nan"))
    assert far(broken) == float("inf")
    with pytest.raises(UsageError, match="empty"):
        Divergence(nn.Linear(5, 3), [])
    with pytest.raises(UsageError, match="no floating-point output"):
        Divergence(Integers(), [Batch((torch.zeros(1),), {}, None)])


class Integers(nn.Module):
    def forward(self, x):
        return x.long()
