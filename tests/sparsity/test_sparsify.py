"""gs.sparsify: exact targets, plans that reload, and every network that breaks other tools."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.errors import NothingToDo, SelectorError, UsageError
from gossamer.projections import l0_project, l1_project
from gossamer.sources.layer_weights import layer_weights


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 4)).eval()


def batches(n=3):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 4, 4, 4, generator=g), torch.randint(4, (4,), generator=g)) for _ in range(n)]


def zeros(model):
    return {n: float((p == 0).float().mean()) for n, p in layer_weights(model).items()}


def test_layers_rows_and_the_whole_network_reach_their_fraction():
    source = net()
    before = {n: t.clone() for n, t in source.state_dict().items()}
    layer = gs.sparsify(source, sparsity=0.75)
    assert zeros(layer.model) == {"0.weight": 0.75, "4.weight": 0.75}
    rows = gs.sparsify(source, sparsity=0.75, scope="row").model
    assert set((rows[4].weight == 0).sum(1).tolist()) == {24}
    whole = gs.sparsify(source, sparsity=0.75, scope="global").model
    total = sum(p.numel() for p in layer_weights(whole).values())
    assert sum(int((p == 0).sum()) for p in layer_weights(whole).values()) == round(0.75 * total)
    assert zeros(whole)["0.weight"] != 0.75
    assert all(torch.equal(t, before[n]) for n, t in source.state_dict().items())


def test_l0_and_l1_are_the_projections():
    source = net()
    w = [source[0].weight.detach(), source[4].weight.detach()]
    for made, want in zip(layer_weights(gs.sparsify(source, l0=20).model).values(), w, strict=True):
        assert torch.equal(made.detach(), l0_project(want, 20))
    for made, want in zip(layer_weights(gs.sparsify(source, l0=20, scope="global").model).values(), l0_project(w, 20), strict=True):
        assert torch.equal(made.detach(), want)
    for made, want in zip(layer_weights(gs.sparsify(source, l1="40%").model).values(), w, strict=True):
        torch.testing.assert_close(made.detach(), l1_project(want, 0.4 * float(want.abs().sum())))
        assert not bool(torch.signbit(made[made == 0]).any())
    row = gs.sparsify(source, l1=0.5, scope="row").model[4].weight.detach()
    assert bool((row.abs().sum(1) <= 0.5 + 1e-5).all())


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "fisher", "snip", "wanda", "second_order"])
def test_every_criterion_reaches_the_target_and_reloads_bit_for_bit(criterion, tmp_path):
    source = net()
    result = gs.sparsify(source, sparsity=0.5, criterion=criterion, calibration=batches())
    assert zeros(result.model) == {"0.weight": 0.5, "4.weight": 0.5}
    back = gs.load(result.save(tmp_path / "r"), source)
    assert all(torch.equal(a, b) for a, b in zip(result.model.state_dict().values(), back.state_dict().values(), strict=True))
    assert all(zeros(result.plan.apply(source))[n] == z for n, z in zeros(result.model).items())
    if criterion == "magnitude":
        assert all(torch.equal(a, b) for a, b in zip(result.plan.apply(source)[0].parameters(), result.model[0].parameters(), strict=True))


def test_patterns_leave_alone_what_they_do_not_divide():
    result = gs.sparsify(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), pattern="2:4")
    assert zeros(result.model) == {"0.weight": 0.0, "1.weight": 0.5}
    assert any("0.weight" in note and "does not divide" in note for note in result.notes)
    blocks = gs.sparsify(nn.Linear(16, 8), pattern="4x2", sparsity=0.5).model.weight.reshape(2, 4, 8, 2) != 0
    assert torch.equal(blocks.all(3).all(1), blocks.any(3).any(1))


def test_a_result_is_continued():
    pruned = gs.prune(net(), (torch.zeros(1, 4, 4, 4),), ratio=0.5)
    result = gs.sparsify(pruned, sparsity=0.5)
    assert result.plan.counts()["mask"] == 2
    assert result.plan.counts()["keep"] > 0
    assert result.proof is pruned.proof
    again = result.plan.apply(net())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), result.model.state_dict().values(), strict=True))
    assert result.after.macs == pruned.after.macs


def test_bad_input_is_one_line():
    source = net()
    for options, text in [
        ({}, "exactly one of sparsity"),
        ({"sparsity": 0.5, "l0": 3}, "exactly one of sparsity"),
        ({"sparsity": 1.0}, "lies in"),
        ({"l0": -1}, "0 or more"),
        ({"l1": "x%"}, "percentage"),
        ({"sparsity": 0.5, "criterion": "magnitud"}, "magnitude"),
        ({"sparsity": 0.5, "criterion": "wanda"}, "needs calibration"),
        ({"l0": 5, "criterion": "second_order", "calibration": batches()}, "sparsity or an N:M"),
    ]:
        with pytest.raises(UsageError, match=text):
            gs.sparsify(source, **options)
    with pytest.raises(SelectorError, match="did you mean"):
        gs.sparsify(source, sparsity=0.5, ignore=["4.weigh"])
    with pytest.raises(NothingToDo, match="no weight becomes zero"):
        gs.sparsify(source, l0=10**6)
    with pytest.raises(NothingToDo, match="no weight that may become sparse"):
        gs.sparsify(nn.BatchNorm2d(3), sparsity=0.5)
    broken = net()
    with torch.no_grad():
        broken[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"0\.weight holds 1 values that are NaN"):
        gs.sparsify(broken, sparsity=0.5)


def test_networks_that_break_other_tools(case, tmp_path):
    model, inputs = case
    model.eval()
    result = gs.sparsify(model, sparsity=0.5, example_inputs=inputs)
    weights = layer_weights(result.model)
    total = sum(p.numel() for p in weights.values())
    assert sum(int((p == 0).sum()) for p in weights.values()) >= 0.45 * total
    back = gs.load(result.save(tmp_path / "r"), model)
    with torch.no_grad():
        call = (lambda m: m(**inputs)) if isinstance(inputs, dict) else (lambda m: m(*inputs))
        for a, b in zip(leaves(call(result.model)), leaves(call(back)), strict=True):
            assert torch.equal(a, b)


def leaves(out):
    from torch.utils import _pytree

    return [t for t in _pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
