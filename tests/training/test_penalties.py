"""Penalties against their formulas, and what they do to a network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.errors import UsageError
from gossamer.training import bn_l1, group_lasso


def test_group_lasso_equals_a_plain_loop():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(8, 3))
    want = 0.0
    for m, axis in ((net[0], 0), (net[1], 1), (net[3], 0)):
        w = np.moveaxis(m.weight.detach().double().numpy(), axis, 0)
        want += sum(np.sqrt(f.size) * np.linalg.norm(f) for f in w)
    assert group_lasso(net).item() == pytest.approx(want, rel=1e-5)


def test_a_filter_of_zeros_has_a_finite_gradient():
    net = nn.Linear(4, 2)
    nn.init.zeros_(net.weight)
    group_lasso(net).backward()
    assert torch.isfinite(net.weight.grad).all()


@pytest.mark.parametrize(("penalty", "measure"), [("bn_l1", bn_l1), ("group_lasso", group_lasso)])
def test_training_with_a_penalty_makes_it_smaller(penalty, measure):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 2))
    data = [(torch.randn(16, 1, 6, 6), torch.randint(0, 2, (16,))) for _ in range(4)]
    plain = gs.fit(net, data, epochs=8, lr=2e-2).model
    small = gs.fit(net, data, epochs=8, lr=2e-2, penalty=penalty, penalty_weight=0.5).model
    assert measure(small).item() < 0.9 * measure(plain).item()


def test_errors_are_one_line():
    data = [(torch.zeros(2, 3), torch.tensor([0, 1]))]
    with pytest.raises(UsageError, match="known are"):
        gs.fit(nn.Linear(3, 2), data, penalty="bn_l2")
    with pytest.raises(UsageError, match="group_lasso"):
        gs.fit(nn.Linear(3, 2), data, penalty="bn_l1")
    with pytest.raises(UsageError, match="above 0"):
        gs.fit(nn.Linear(3, 2), data, penalty="group_lasso", penalty_weight=0)
