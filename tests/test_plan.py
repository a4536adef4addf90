"""Plans against direct indexing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.errors import PlanError
from gossamer.plan import AddBias, Factorize, Keep, Mask, Plan, SetAttribute, Share, apply_structure, input_specs, pack_mask


def test_keep_equals_direct_indexing_and_leaves_the_source_alone():
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    index = (0, 2, 3)
    edits = [
        Keep(tensor="0.weight", dim=0, index=index),
        Keep(tensor="0.bias", dim=0, index=index),
        Keep(tensor="1.weight", dim=1, index=index),
    ]
    cut = apply_structure(net, edits)
    assert torch.equal(cut[0].weight, before["0.weight"][list(index)])
    assert torch.equal(cut[1].weight, before["1.weight"][:, list(index)])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_keep_by_blocks_takes_other_channels_in_each_group():
    conv = nn.Conv2d(8, 6, 3, groups=2)
    cut = apply_structure(nn.Sequential(conv), [Keep(tensor="0.weight", dim=1, index=((0, 1), (2, 3)))])
    want = torch.cat([conv.weight[:3, [0, 1]], conv.weight[3:, [2, 3]]])
    assert torch.equal(cut[0].weight, want)


def test_a_tied_parameter_stays_tied():
    net = nn.ModuleDict({"a": nn.Embedding(6, 4), "b": nn.Linear(4, 6, bias=False)})
    net["b"].weight = net["a"].weight
    cut = apply_structure(net, [Keep(tensor="a.weight", dim=1, index=(1, 3))])
    assert cut["a"].weight is cut["b"].weight
    assert cut["b"].weight.shape == (6, 2)


def test_two_cuts_of_one_tensor_follow_each_other():
    net = nn.Sequential(nn.Linear(4, 6))
    cut = apply_structure(net, [Keep(tensor="0.weight", dim=0, index=(1, 3, 5)), Keep(tensor="0.weight", dim=0, index=(0, 2))])
    assert torch.equal(cut[0].weight, net[0].weight[[1, 5]])


def test_add_bias_and_set_attribute():
    cut = apply_structure(
        nn.Sequential(nn.Linear(4, 3, bias=False)), [AddBias(module="0", size=3), SetAttribute(module="0", name="in_features", value=4)]
    )
    assert torch.equal(cut[0].bias, torch.zeros(3))


def test_a_factorised_layer_is_exchanged_wherever_it_is_registered():
    net = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Sequential(nn.Linear(4, 4))})
    net["again"] = net["a"]
    edit = Factorize(module="a", method="svd", ranks=(4,), bias=True)
    for values in (True, False):
        made = Plan(edits=(edit,)).apply(net, values=values)
        assert made["a"] is made["again"]
        want = net["a"](torch.ones(2, 6)) if values else torch.zeros(2, 4)
        torch.testing.assert_close(made["a"](torch.ones(2, 6)), want)
        assert made["b"][0].weight is not net["b"][0].weight
    assert isinstance(net["a"], nn.Linear)


def test_saved_and_loaded_plans_are_equal(tmp_path):
    plan = Plan(
        edits=(Keep(tensor="a.weight", dim=1, index=((0, 1), (1, 2))), AddBias(module="a", size=2)),
        inputs=input_specs((torch.zeros(1, 3),)),
    )
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert [t.shape for t in plan.example_inputs()] == [(1, 3)]


def test_keyword_inputs_come_back_as_a_dict():
    specs = input_specs({"ids": torch.zeros(2, 3, dtype=torch.long)})
    inputs = Plan(inputs=specs).example_inputs()
    assert inputs["ids"].dtype == torch.long


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Keep(tensor="0.wieght", dim=0, index=(0,)), "did you mean '0.weight'"),
        (Keep(tensor="0.weight", dim=0, index=(9,)), "shape (3, 4)"),
        (Keep(tensor="0.weight", dim=5, index=(0,)), "shape (3, 4)"),
        (SetAttribute(module="9", name="x", value=1), "no module '9'"),
        (Factorize(module="9", method="svd", ranks=(1,), bias=True), "no module '9'"),
        (Factorize(module="", method="svd", ranks=(1,), bias=True), "neither a linear layer nor a convolution"),
        (Factorize(module="0", method="svd", ranks=(4,), bias=True), "0: svd takes ranks from 1 to (3,), not (4,)"),
        (Factorize(module="0", method="cp", ranks=(1,), bias=True), "does not factorise"),
        (SetAttribute(module="0", name="nope", value=1), "no attribute 'nope'"),
    ],
)
def test_an_edit_that_does_not_fit_says_what_and_where(edit, words):
    with pytest.raises(PlanError) as e:
        apply_structure(nn.Sequential(nn.Linear(4, 3)), [edit])
    assert words in str(e.value)


def test_a_broken_plan_file_is_one_line(tmp_path):
    (tmp_path / "p.json").write_text('{"edits": [{"kind": "keep"}]}')
    with pytest.raises(PlanError, match="is not a plan"):
        Plan.load(tmp_path / "p.json")
    with pytest.raises(PlanError, match="no plan at"):
        Plan.load(tmp_path / "absent.json")


def test_masks_and_codebooks_are_applied_in_order_and_reload(tmp_path):
    net = nn.Linear(4, 2)
    w = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.1, 0.2, -0.3, 4.0]])
    with torch.no_grad():
        net.weight.copy_(w)
    kept = w.abs() >= 0.5
    edits = (
        Mask(tensor="weight", shape=(2, 4), nonzeros=int(kept.sum()), kept=pack_mask(kept)),
        Share(tensors=("weight",), bits=1, codebooks=((-2.0, 2.0), (-1.0, 4.0)), zeros=True),
    )
    plan = Plan(edits=edits)
    expected = torch.tensor([[2.0, -2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 4.0]])
    for made in (plan.apply(net), Plan.load(plan.save(tmp_path / "p.json")).apply(net)):
        assert torch.equal(made.weight, expected)
    assert torch.equal(net.weight, w)
    assert "mask      weight: 5 of 8 stay" in str(plan)
    assert "share     weight: 4 values, and zero" in str(plan)


def test_a_mask_that_does_not_fit_is_one_line():
    edit = Mask(tensor="weight", shape=(2, 4), nonzeros=8, kept=pack_mask(torch.ones(2, 4, dtype=torch.bool)))
    with pytest.raises(PlanError, match=r"weight has shape \(2, 3\), the plan's mask \(2, 4\)"):
        Plan(edits=(edit,)).apply(nn.Linear(3, 2))
    with pytest.raises(PlanError, match="damaged"):
        Plan(edits=(edit.model_copy(update={"kept": "no mask"}),)).apply(nn.Linear(4, 2))
    with pytest.raises(PlanError, match="has 1 bytes, and 16 entries need 2"):
        Plan(edits=(edit.model_copy(update={"shape": (4, 4)}),)).apply(nn.Linear(4, 4))
