"""Budgets of a real network's training step, over their whole range."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import BudgetError
from gossamer.models import mobilenet_v2
from gossamer.training import fit


@pytest.mark.slow
def test_every_budget_of_mobilenet_is_kept_used_and_changes_nothing():
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, 3, 128, 128, generator=g), torch.randint(10, (16,), generator=g)) for _ in range(2)]
    torch.manual_seed(0)
    model = mobilenet_v2(num_classes=10)
    options = {"lr": 1e-2, "optimizer": "sgd", "seed": 0}
    plain = fit(model, batches, measure_memory=True, **options)
    with pytest.raises(BudgetError) as e:
        fit(model, batches, memory_budget="20MB", **options)
    smallest = int(str(e.value).split("reached is ")[1].split(" MB")[0]) * 10**6 + 10**6
    assert smallest < 0.4 * plain.memory.peak_bytes
    for part in (0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95):
        budget = int(smallest + part * (plain.memory.peak_bytes - smallest))
        small = fit(model, batches, memory_budget=budget, **options)
        assert 0.9 * budget <= small.memory.peak_bytes <= budget, f"{small.memory.peak_bytes / 1e6:.1f} MB for {budget / 1e6:.1f}"
        for (name, a), b in zip(plain.model.state_dict().items(), small.model.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
