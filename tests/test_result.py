"""Transforms that continue a result's plan, in the order in which nothing is undone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.errors import UsageError
from gossamer.pruning import prune_in_steps

INPUTS = (torch.zeros(1, 3, 8, 8),)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    ).eval()


def test_four_transforms_make_one_plan_that_rebuilds_the_network(tmp_path):
    x = torch.randn(16, 3, 8, 8)
    pruned = gs.prune(net(), INPUTS, ratio=0.25)
    sparse = gs.sparsify(pruned, sparsity=0.5)
    shared = gs.cluster(sparse, bits=3)
    small = gs.quantize(shared, INPUTS, calibration=[x])
    assert {"keep", "mask", "share", "quantize_weight"} <= set(small.plan.counts())
    assert small.before == pruned.before
    assert small.proof == pruned.proof
    assert set(sparse.notes) <= set(small.notes)
    again = gs.load(small.save(tmp_path / "r"), net())
    assert torch.equal(again(x), small.model(x))


def test_pruning_in_steps_continues_too():
    first = gs.prune(net(), INPUTS, ratio=0.25)
    more = prune_in_steps(first, INPUTS, ratio=0.5, schedule="iterative", steps=2)
    assert more.before == first.before
    assert more.model[0].out_channels == 6
    made = more.plan.apply(net())
    assert torch.equal(made(torch.ones(1, 3, 8, 8)), more.model(torch.ones(1, 3, 8, 8)))


def test_what_would_be_undone_is_refused():
    sparse = gs.sparsify(net(), sparsity=0.5)
    with pytest.raises(UsageError, match="prune would undo sparsify"):
        gs.prune(sparse, INPUTS, ratio=0.5)
    with pytest.raises(UsageError, match="sparsify would undo cluster"):
        gs.sparsify(gs.cluster(net(), bits=2), sparsity=0.5)
    small = gs.quantize(net(), INPUTS, calibration=[torch.randn(4, 3, 8, 8)])
    for step in (lambda r: gs.prune(r, INPUTS, ratio=0.5), lambda r: gs.cluster(r), lambda r: gs.quantize(r, INPUTS, calibration=[])):
        with pytest.raises(UsageError, match="would undo quantize"):
            step(small)
    with pytest.raises(UsageError, match=r"takes a torch\.nn\.Module or a Result, not str"):
        gs.prune("resnet8", INPUTS, ratio=0.5)
