"""gs.decouple: given sizes and budgets; plans that reload; composition; every network that breaks other tools."""

from __future__ import annotations

import copy

import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils import _pytree

import gossamer as gs
from gossamer.adapters import ChannelOrder, ChannelRepeat
from gossamer.calibration import Divergence
from gossamer.errors import BudgetError, NothingToDo, PlanError, RecipeError, SelectorError, UsageError
from gossamer.plan import Decouple, Plan
from gossamer.profiling.chains import chain, time_chains
from gossamer.recipe import Recipe
from gossamer.sources.batches import Batch

X = (torch.zeros(1, 3, 12, 12),)
FORMS = {"depthwise_separable": {"terms": 2}, "grouped": {"groups": 4}, "bottleneck": {"width": 0.5}}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    ).eval()  # fmt: skip


def batches(n=3):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 12, 12, generator=g).cumsum(-1), torch.randint(10, (16,), generator=g)) for _ in range(n)]


def state_equal(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and all(torch.equal(x, b.state_dict()[n]) for n, x in a.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_plans_reload_bit_for_bit_and_the_plan_alone_gives_plain_weights(form, tmp_path):
    source = net()
    before = copy.deepcopy(source.state_dict())
    options = {"form": form, **FORMS[form], "ignore": ["0", "8"], "runtime": None}
    result = gs.decouple(source, X, calibration=batches(), **options)
    assert [(e.module, e.form) for e in result.plan] == [("3", form), ("6", form)]
    assert [e.bias for e in result.plan] == [False, True]
    assert result.after.macs < result.before.macs
    back = gs.load(result.save(tmp_path / "r"), source)
    assert state_equal(result.model, back)
    x = batches(1)[0][0]
    with torch.no_grad():
        assert torch.equal(result.model(x), back(x))
    assert Plan.load(result.plan.save(tmp_path / "plan.json")) == result.plan
    assert f"decouple  3: {form.replace('_', ' ')}, " in str(result.plan)
    plain = gs.decouple(source, X, reestimate_bn=False, **options)
    assert state_equal(plain.plan.apply(source), plain.model)
    with torch.no_grad():
        assert torch.equal(plain.plan.apply(source)(x), plain.model(x))
    again = gs.decouple(source, X, calibration=batches(), **options)
    assert again.plan == result.plan
    assert state_equal(again.model, result.model)
    assert all(torch.equal(before[n], t) for n, t in source.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_data_aware_beats_plain_on_the_same_macs_on_data_it_has_not_seen(form):
    source = net()
    x = torch.cat([b[0] for b in batches(6)[3:]])
    lost = []
    with torch.no_grad():
        for data in (None, batches()):
            made = gs.decouple(source, X, form=form, **FORMS[form], ignore=["0"], calibration=data, runtime=None, reestimate_bn=False)
            lost.append(float((made.model(x) - source(x)).square().mean()))
    assert lost[1] < 0.8 * lost[0]


def test_the_order_back_comes_after_the_batch_norm_so_that_this_stays_beside_its_convolution():
    source = net()
    result = gs.decouple(source, X, form="grouped", groups=4, ignore=["0", "8"], runtime=None)
    assert [e.norm for e in result.plan] == ["4", None]
    assert [type(m).__name__ for m in result.model[3]] == ["ChannelOrder", "Conv2d"]
    assert [type(m).__name__ for m in result.model[4]] == ["BatchNorm2d", "ChannelOrder"]
    assert [type(m).__name__ for m in result.model[6]] == ["ChannelOrder", "Conv2d", "ChannelOrder"]
    with torch.no_grad():
        (
            source[4].weight.uniform_(0.5, 2),
            source[4].bias.normal_(),
            source[4].running_mean.normal_(),
            source[4].running_var.uniform_(0.5, 2),
        )
        block = torch.randperm(32)[:, None] % 4 == torch.randperm(16) % 4
        source[3].weight *= block[:, :, None, None]
        x = torch.randn(2, 3, 12, 12)
        exact = gs.decouple(source, X, form="grouped", groups=4, ignore=["0", "6", "8"], runtime=None)
        torch.testing.assert_close(exact.model(x), source(x))
    wrong = Plan(edits=(exact.plan.edits[0].model_copy(update={"norm": "5"}),))
    with pytest.raises(PlanError, match="'5' is not a batch norm of the 32 channels"):
        wrong.apply(source)


def test_means_go_into_the_batch_norm_that_follows_and_else_into_the_bias():
    source = net()
    result = gs.decouple(source, X, ignore=["0"], calibration=batches(), runtime=None, reestimate_bn=False)
    assert result.model[3][-1].bias is None
    assert result.model[6][-1].bias is not None
    assert not torch.equal(result.model[4].running_mean, source[4].running_mean)
    x = torch.cat([b[0] for b in batches()])
    with torch.no_grad():
        torch.testing.assert_close(result.model[:5](x).mean((0, 2, 3)), source[:5](x).mean((0, 2, 3)), atol=0.02, rtol=0.02)
    measured = gs.decouple(source, X, ignore=["0"], calibration=batches(), runtime=None)
    assert "2 batch norms re-estimated" in measured.notes
    assert not torch.equal(measured.model[1].running_var, source[1].running_var)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("calibrated", [True, False])
def test_budgets_are_met_and_not_by_much_more(form, calibrated):
    source, ticks = net(), []
    options = {"form": form, "macs": 0.6, "calibration": batches() if calibrated else None, "runtime": None}
    result = gs.decouple(source, X, progress=lambda done, total: ticks.append((done, total)), **options)
    assert 0.45 < result.after.macs / result.before.macs <= 0.6
    assert ticks[-1][0] == ticks[-1][1] > 5
    assert gs.decouple(source, X, **options).plan == result.plan


def test_an_allocated_budget_spares_the_layer_that_is_not_separable():
    """A layer of one term for each channel beside one that has none to spare."""
    torch.manual_seed(0)
    source = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with torch.no_grad():
        source[0].weight.copy_(torch.randn(16, 16, 1, 1) * torch.randn(1, 16, 3, 3) / 8)
    data = [torch.randn(16, 16, 9, 9) for _ in range(3)]
    far = Divergence(source, [Batch((torch.randn(32, 16, 9, 9),), {}, None)])
    allocated = gs.decouple(source, (data[0],), macs=0.55, calibration=data, runtime=None)
    assert [(e.module, e.sizes) for e in allocated.plan] == [("0", (1,))]
    assert far(allocated.model) < 1e-6


def test_every_form_composes_prunes_before_quantises_after_and_runs_the_same_in_the_runtime(tmp_path):
    source, data = net(), batches()
    pruned = gs.prune(source, X, ratio=0.25, calibration=data, round_to=4)
    for form, sizes in FORMS.items():
        made = gs.decouple(pruned, form=form, **sizes, ignore=["0"], calibration=data, runtime=None)
        trained = gs.fit(made, data, epochs=1)
        assert trained.plan == made.plan
        results = {"float": trained} if form != "depthwise_separable" else {}
        results |= {"int8": gs.quantize(trained, X, calibration=data)} if form != "bottleneck" else {}
        for name, result in results.items():
            back = gs.load(result.save(tmp_path / f"{form}-{name}"), source)
            with torch.no_grad():
                assert torch.equal(back(data[0][0]), result.model.eval()(data[0][0]))
            gs.export(result, tmp_path / f"{form}-{name}.onnx")
            session = onnxruntime.InferenceSession(tmp_path / f"{form}-{name}.onnx", providers=["CPUExecutionProvider"])
            x = data[0][0][:1]
            with torch.no_grad():
                want = result.model(x)
            (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            far = float((torch.from_numpy(got) - want).norm() / want.norm())
            assert far < (1e-4 if name == "float" else 0.1)
            assert result.plan.counts()["decouple"] >= 2
            assert result.plan.counts()["keep"] > 0
        assert not [n for n in result.notes if "index_select" in n or "batch norm)" in n]  # all norms are folded


def test_decoupled_networks_are_pruned_again_and_other_steps_know_their_place():
    source, data = net(), batches()
    for form, sizes in FORMS.items():
        made = gs.decouple(source, X, form=form, **sizes, ignore=["0", "3", "8"], calibration=data, runtime=None)
        again = gs.prune(made.model, X, ratio=0.25)
        assert again.proof.holds
        assert again.after.macs < made.after.macs
        sparse = gs.sparsify(made, sparsity=0.5)
        with pytest.raises(UsageError, match="decouple would undo sparsify"):
            gs.decouple(sparse, X)
        with pytest.raises(UsageError, match="prune would undo decouple"):
            gs.prune(made, X, ratio=0.5)
    separable = gs.decouple(source, X, ignore=["0", "3"], calibration=data, runtime=None)
    both = gs.factorize(separable, method="svd", rank={"6.1": 8}, calibration=data, runtime=None)
    assert [e.kind for e in both.plan] == ["decouple", "factorize"]
    other = gs.decouple(gs.factorize(source, X, method="svd", rank={"3": 8}, runtime=None), ignore=["0", "6"], runtime=None)
    assert [(e.kind, e.module) for e in other.plan] == [("factorize", "3"), ("decouple", "3.0")]
    assert state_equal(other.plan.apply(source), other.model)
    graph = gs.prune(source, X, ratio=0.25, form="graph")
    with pytest.raises(NothingToDo, match="as a graph"):
        gs.decouple(graph)


def test_networks_that_break_other_tools(case, tmp_path):
    model, inputs = case
    model.eval()
    call = (lambda m: m(**inputs)) if isinstance(inputs, dict) else (lambda m: m(*inputs))
    done = 0
    for form, sizes in {"depthwise_separable": {}, "grouped": {"groups": 2}, "bottleneck": {"width": 0.25}}.items():
        try:
            result = gs.decouple(model, inputs, form=form, **sizes, runtime=None)
        except NothingToDo:
            continue
        done += 1
        back = gs.load(result.save(tmp_path / form), model)
        with torch.no_grad():
            for a, b, c in zip(leaves(call(result.model)), leaves(call(back)), leaves(call(model)), strict=True):
                assert torch.equal(a, b)
                assert a.shape == c.shape
        assert result.after.macs < result.before.macs
    dense = any(type(m) in (nn.Conv1d, nn.Conv2d) and m.groups == 1 and m.weight[0, 0].numel() > 1 for m in model.modules())
    assert bool(done) or not dense


def leaves(out):
    return [t for t in _pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


def test_a_layer_registered_twice_a_network_that_is_one_and_what_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(8, 8, 3, padding=1)
            self.again = self.a
            self.tied, self.tied2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.tied2.weight = self.tied.weight
            self.unused = nn.Conv2d(8, 8, 3)
            self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=8)

        def forward(self, x):
            return self.wide(self.tied2(self.tied(self.again(self.a(x)))))

    result = gs.decouple(Twice().eval(), (torch.zeros(1, 8, 6, 6),), runtime=None)
    assert result.model.a is result.model.again
    text = "\n".join(result.notes)
    assert "parameters are tied to another layer's: tied, tied2" in text
    assert "it never ran on the example inputs: unused" in text
    assert "this saves no multiply-adds there: wide" in text
    one = gs.decouple(nn.Conv2d(8, 8, 3), (torch.zeros(1, 8, 6, 6),), form="grouped", groups=2, runtime=None)
    assert isinstance(one.model, nn.Sequential)
    assert state_equal(one.plan.apply(nn.Conv2d(8, 8, 3)), one.plan.apply(nn.Conv2d(8, 8, 3), values=False)) is False


def test_layers_are_timed_and_notes_say_which_got_slower(monkeypatch):
    source = net()
    monkeypatch.setattr("gossamer.decoupling.choice.time_chains", lambda chains, shape, threads: [1.0, 2.0])
    result = gs.decouple(source, X, ignore=["0", "3"])
    assert "slower in ONNX Runtime than the layer before: 6 (2.00 times)" in result.notes
    monkeypatch.undo()
    nodes = chain([ChannelOrder([1, 0, 2], spatial=2), nn.Conv2d(3, 4, 3)])
    assert [n.op for n in nodes] == ["order", "conv"]
    assert all(ms > 0 for ms in time_chains([nodes, nodes[1:]], (1, 3, 8, 8)))
    repeated = chain([ChannelRepeat(2, spatial=2), nn.Conv2d(6, 6, 3, groups=6)])
    assert [(n.op, n.ins, n.outs) for n in repeated] == [("repeat", 3, 6), ("conv", 6, 6)]
    assert all(ms > 0 for ms in time_chains([repeated], (1, 3, 8, 8)))


def test_the_step_in_yaml_and_its_mistakes():
    recipe = Recipe.parse("steps: [{prune: {ratio: 0.2}}, {decouple: {form: grouped, groups: 4}}, {factorize: {rank: 4}}, quantize]")
    assert recipe.steps[1].groups == 4
    assert Recipe.parse(recipe.dump()) == recipe
    assert Recipe.parse("steps: [decouple]").steps[0].terms == 1
    for text, words in [
        ("steps: [{decouple: {form: grouped}}]", "needs groups or macs"),
        ("steps: [{decouple: {form: bottleneck}}]", "needs width or macs"),
        ("steps: [{decouple: {terms: 2, macs: 0.5}}]", "the one of its form, or macs"),
        ("steps: [{decouple: {width: 0.5}}]", "the one of its form, or macs"),
        ("steps: [decouple, {prune: {ratio: 0.5}}]", "prune comes before decouple"),
        ("steps: [{sparsify: {sparsity: 0.5}}, decouple]", "decouple comes before sparsify"),
    ]:
        with pytest.raises(RecipeError, match=words) as e:
            Recipe.parse(text)
        assert "\n" not in str(e.value)


def test_bad_input_is_one_line():
    source = net()
    for options, text in [
        ({"form": "group"}, "did you mean 'grouped'"),
        ({"form": "grouped"}, "needs 2 or more"),
        ({"form": "grouped", "groups": 1}, "needs 2 or more"),
        ({"form": "bottleneck", "width": 1.5}, "needs a fraction"),
        ({"groups": 2}, "has no groups"),
        ({"form": "grouped", "groups": 2, "terms": 3}, "has no terms"),
        ({"terms": 2, "macs": 0.5}, "macs= chooses it"),
        ({"macs": 1.5}, "fraction between 0 and 1"),
        ({"terms": 0}, "terms=0"),
        ({"runtime": "tensorrt"}, "runtime='tensorrt'"),
        ({"samples": 0}, "samples=0"),
        ({"calibration": []}, "the data is empty"),
    ]:
        with pytest.raises(UsageError, match=text) as e:
            gs.decouple(source, X, **options)
        assert "\n" not in str(e.value)
    with pytest.raises(SelectorError, match="did you mean"):
        gs.decouple(source, X, ignore=["13"])
    with pytest.raises(NothingToDo, match="this saves no multiply-adds there: 0, 3, 6; left alone, its kernel has one position: 8"):
        gs.decouple(source, X, terms=9, runtime=None)
    with pytest.raises(NothingToDo, match="groups do not divide its channels: 0, 3, 6 and 1 more"):
        gs.decouple(source, X, form="grouped", groups=7, runtime=None)
    with pytest.raises(NothingToDo, match="no convolution is decoupled: it has none"):
        gs.decouple(nn.Linear(4, 4), (torch.zeros(1, 4),))
    with pytest.raises(BudgetError, match="the lowest possible is"):
        gs.decouple(source, X, macs=0.01, runtime=None)
    with torch.no_grad():
        source[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"0\.weight holds 1 values"):
        gs.decouple(source, X)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Decouple(module="9", form="grouped", sizes=(2,), bias=True), "no module '9'"),
        (Decouple(module="1", form="grouped", sizes=(2,), bias=True), "is a ReLU, not a convolution"),
        (Decouple(module="0", form="grouped", sizes=(3,), bias=True), "3 groups do not divide"),
        (Decouple(module="0", form="bottleneck", sizes=(2,), bias=True), "takes 2 sizes"),
        (Decouple(module="0", form="depthwise_separable", sizes=(7,), bias=True), "sizes from 1 to 6"),
        (Decouple(module="0", form="grouped", sizes=(2,), bias=True, inputs=(0, 1, 2, 2)), "order of its inputs"),
        (Decouple(module="0", form="depthwise_separable", sizes=(2,), bias=True, outputs=(5, 4, 3, 2, 1, 0)), "order of its outputs"),
    ],
)
def test_edits_that_do_not_fit(edit, words):
    with pytest.raises(PlanError, match=words):
        Plan(edits=(edit,)).apply(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()))
