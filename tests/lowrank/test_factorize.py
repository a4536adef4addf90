"""gs.factorize: ranks given, found and allocated; plans that reload; every network that breaks other tools."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree

import gossamer as gs
from gossamer.calibration import Divergence
from gossamer.errors import BudgetError, NothingToDo, SelectorError, UsageError
from gossamer.lowrank import find_sites
from gossamer.lowrank.options import ladder, smoothed
from gossamer.plan import Factorize, Plan
from gossamer.sources.batches import Batch

X = (torch.zeros(1, 3, 12, 12),)


def net():
    """A trained-like network: weights of quickly falling singular values."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 96, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                u, s, vt = torch.linalg.svd(m.weight.flatten(1), full_matrices=False)
                m.weight.copy_(((u * (s * torch.exp(-torch.arange(len(s)) / 8))) @ vt * 4).reshape(m.weight.shape))
    return model.eval()


def batches(n=4):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 12, 12, generator=g).cumsum(-1), torch.randint(10, (16,), generator=g)) for _ in range(n)]


def state_equal(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and all(torch.equal(x, b.state_dict()[n]) for n, x in a.state_dict().items())


@pytest.mark.parametrize("method", ["svd", "spatial_svd", "tucker2", "cp"])
def test_given_ranks_reload_bit_for_bit_and_the_plan_alone_gives_plain_factors(method, tmp_path):
    source = net()
    before = copy.deepcopy(source.state_dict())
    result = gs.factorize(source, X, method=method, rank={"3": 8, "6": 16}, calibration=batches(), runtime=None)
    edits = [e for e in result.plan if isinstance(e, Factorize)]
    assert [(e.module, e.method, set(e.ranks)) for e in edits] == [("3", method, {8}), ("6", method, {16})]
    assert result.after.macs < result.before.macs
    assert result.after.params < result.before.params
    assert isinstance(result.model[3], nn.Sequential)
    back = gs.load(result.save(tmp_path / "r"), source)
    assert state_equal(result.model, back)
    x = batches(1)[0][0]
    with torch.no_grad():
        assert torch.equal(result.model(x), back(x))
    assert Plan.load(result.plan.save(tmp_path / "plan.json")) == result.plan
    assert f"factorise 3: {method}, rank 8" in str(result.plan)
    plain = gs.factorize(source, X, method=method, rank={"3": 8, "6": 16}, runtime=None, reestimate_bn=False)
    assert state_equal(plain.plan.apply(source), plain.model)
    assert all(torch.equal(before[n], t) for n, t in source.state_dict().items())


def test_data_aware_beats_plain_on_the_same_macs_on_data_it_has_not_seen():
    source = net()
    x = torch.cat([b[0] for b in batches(8)[4:]])
    with torch.no_grad():
        want = source(x)
        lost = {}
        for name, data in (("plain", None), ("data", batches())):
            result = gs.factorize(source, X, method="svd", rank=0.25, calibration=data, runtime=None, reestimate_bn=False)
            lost[name] = float((result.model(x) - want).square().mean()), result.after.macs
    assert lost["data"][1] == lost["plain"][1]
    assert lost["data"][0] < 0.7 * lost["plain"][0]


def test_means_go_into_the_batch_norm_that_follows_and_else_into_the_bias():
    source = net()
    result = gs.factorize(source, X, method="svd", rank={"3": 4, "6": 4, "8": 4}, calibration=batches(), runtime=None, reestimate_bn=False)
    assert result.model[3][-1].bias is None
    assert result.model[6][-1].bias is not None
    assert not torch.equal(result.model[4].running_mean, source[4].running_mean)
    assert torch.equal(result.model[1].running_mean, source[1].running_mean)
    x = torch.cat([b[0] for b in batches()])
    with torch.no_grad():
        wanted, got = source[:5](x).mean((0, 2, 3)), result.model[:5](x).mean((0, 2, 3))
    torch.testing.assert_close(got, wanted, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("methods", ["svd", ("svd", "spatial_svd", "tucker2")])
def test_energy_keeps_the_least_ranks_that_hold_it(methods):
    source = net()
    result = gs.factorize(source, X, method=methods, energy=0.99, runtime=None, round_to=1)
    for e in result.plan:
        if e.method != "svd":
            continue
        s = np.linalg.svd(source.get_submodule(e.module).weight.detach().flatten(1).double().numpy())[1] ** 2
        assert s[: e.ranks[0]].sum() >= 0.99 * s.sum() * (1 - 1e-6)
        assert s[: e.ranks[0] - 1].sum() < 0.99 * s.sum()
    with_data = gs.factorize(source, X, method=methods, energy=0.99, calibration=batches(), runtime=None)
    assert with_data.after.macs < result.before.macs


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_budgets_are_met_and_not_by_much_more(kind, calibrated):
    source = net()
    ticks = []
    result = gs.factorize(
        source, X, method=("svd", "spatial_svd", "tucker2"), **{kind: 0.6}, calibration=batches() if calibrated else None, runtime=None,
        progress=lambda done, total: ticks.append((done, total)),
    )  # fmt: skip
    part = getattr(result.after, kind) / getattr(result.before, kind)
    assert 0.5 < part <= 0.6 + 1e-9
    assert ticks[-1][0] == ticks[-1][1] > 5
    again = gs.factorize(
        source, X, method=("svd", "spatial_svd", "tucker2"), **{kind: 0.6}, calibration=batches() if calibrated else None, runtime=None
    )
    assert again.plan == result.plan
    assert state_equal(again.model, result.model)


def test_biases_that_are_added_count_against_a_budget_of_parameters():
    torch.manual_seed(0)
    source = nn.Sequential(
        nn.Linear(48, 48, bias=False), nn.Tanh(), nn.Linear(48, 48, bias=False), nn.Tanh(), nn.Linear(48, 48, bias=False)
    )
    data = [torch.randn(64, 48) + 1 for _ in range(3)]
    result = gs.factorize(source, (data[0],), method="svd", params=0.7, calibration=data, runtime=None, round_to=1)
    assert all(e.bias for e in result.plan)
    assert 0.6 < result.after.params / result.before.params <= 0.7


def test_an_allocated_budget_spares_the_layer_that_has_no_low_rank():
    """A layer of rank 8 beside one of equal singular values: judged by the divergence on data not seen, far better than both at one fraction."""
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    with torch.no_grad():
        source[0].weight.copy_(torch.randn(64, 8) @ torch.randn(8, 64) / 16)
        nn.init.orthogonal_(source[2].weight).mul_(2)
    data = [torch.randn(64, 64) for _ in range(4)]
    far = Divergence(source, [Batch((torch.randn(200, 64),), {}, None)])
    uniform = gs.factorize(source, (data[0],), method="svd", rank={"0": 24, "2": 24}, calibration=data, runtime=None)
    share = uniform.after.macs / uniform.before.macs
    allocated = gs.factorize(source, (data[0],), method="svd", macs=share, calibration=data, runtime=None)
    assert [e.module for e in allocated.plan] == ["0"]
    assert allocated.after.macs <= uniform.after.macs
    assert far(allocated.model) < 0.05 * far(uniform.model)


@pytest.mark.parametrize("measured", [2e11, 0.0])
def test_a_layer_that_seems_free_on_the_data_that_it_is_fitted_to_is_spared(measured, monkeypatch):
    """Fewer samples than inputs: fitted to all of them a layer of equal singular values seems to lose nothing at a low rank."""
    monkeypatch.setattr("gossamer.calibration.judging.MEASURED_MACS", measured)
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    with torch.no_grad():
        nn.init.orthogonal_(source[0].weight)
        source[2].weight.copy_(torch.randn(64, 8) @ torch.randn(8, 256) / 40 + torch.randn(64, 256) / 100)
    data = [torch.randn(20, 256) for _ in range(2)]
    far = Divergence(source, [Batch((torch.randn(400, 256),), {}, None)])
    for share in (0.95, 0.87):
        result = gs.factorize(source, (data[0],), method="svd", macs=share, calibration=data, runtime=None)
        assert [e.module for e in result.plan] == ["2"]
        forced = gs.factorize(source, (data[0],), method="svd", macs=share, calibration=data, runtime=None, ignore=["2"])
        assert far(result.model) < 0.2 * far(forced.model)


@pytest.mark.parametrize("decoupled", [False, True])
def test_predicted_losses_allocate_as_measured_ones_do(decoupled, monkeypatch):
    source = net()
    far = Divergence(source, [Batch((batches(8)[7][0],), {}, None)])
    found = []
    for measured in (2e11, 0.0):
        monkeypatch.setattr("gossamer.calibration.judging.MEASURED_MACS", measured)
        if decoupled:
            result = gs.decouple(source, X, macs=0.7, calibration=batches(), runtime=None)
        else:
            result = gs.factorize(source, X, method=("svd", "spatial_svd", "tucker2"), macs=0.7, calibration=batches(), runtime=None)
        assert result.after.macs <= 0.7 * result.before.macs
        found.append(far(result.model))
    assert found[1] < 1.3 * found[0] + 1e-4


def test_auto_chooses_only_what_is_faster_and_forced_methods_say_what_is_slower(monkeypatch):
    source = net()
    monkeypatch.setattr("gossamer.lowrank.options.time_chains", lambda chains, shape, threads: [1.0] + [0.5] * (len(chains) - 1))
    assert gs.factorize(source, X, rank=8).plan.counts()["factorize"] >= 2
    monkeypatch.setattr("gossamer.lowrank.options.time_chains", lambda chains, shape, threads: [1.0] + [2.0] * (len(chains) - 1))
    with pytest.raises(NothingToDo, match="not faster in ONNX Runtime"):
        gs.factorize(source, X, rank=8)
    with pytest.raises(NothingToDo, match="not faster in ONNX Runtime at any rank"):
        gs.factorize(source, X, macs=0.6)
    forced = gs.factorize(source, X, method="svd", rank={"6": 8})
    assert any("slower in ONNX Runtime than the layer before: 6 (2.00 times)" in n for n in forced.notes)


def test_times_that_rise_as_ranks_fall_are_smoothed():
    site = find_sites(nn.Conv2d(64, 64, 3), (torch.zeros(1, 64, 8, 8),))[0][0]
    options = ladder(site, ("svd", "tucker2"))
    measured = torch.rand(len(options), generator=torch.Generator().manual_seed(0)).tolist()
    given = [replace(o, ms=ms, before_ms=0.5) for o, ms in zip(options, measured, strict=True)]
    found = smoothed(given)
    for method in ("svd", "tucker2"):
        assert [o.ms for o in found if o.method == method] == list(np.minimum.accumulate([o.ms for o in given if o.method == method]))
    assert [(o.method, o.ranks, o.before_ms) for o in found] == [(o.method, o.ranks, 0.5) for o in options]
    assert smoothed(options) == options


def test_a_latency_target_is_allocated_for_again_where_the_whole_network_is_slower_than_its_layers(monkeypatch):
    source = net()
    tried = []

    def whole(original, changed, inputs, threads):
        tried.append(sum(isinstance(m, nn.Sequential) for m in changed))
        return (0.8, "latency of the first") if len(tried) == 1 else (0.69, "latency of the second")

    monkeypatch.setattr(
        "gossamer.lowrank.options.time_chains", lambda chains, shape, threads: [float(sum(n.ins * n.outs for n in c)) for c in chains]
    )
    monkeypatch.setattr("gossamer.lowrank.allocation.measured_fraction", whole)
    monkeypatch.setattr("gossamer.lowrank.allocation.whole_ms", lambda *a: 1e9)
    with pytest.raises(BudgetError, match="of the latency: the lowest possible is"):
        gs.factorize(source, X, latency=0.7, calibration=batches())
    monkeypatch.setattr("gossamer.lowrank.allocation.whole_ms", lambda *a: 20000.0)
    result = gs.factorize(source, X, latency=0.7, calibration=batches())
    assert len(tried) == 2
    assert "latency of the second" in result.notes


@pytest.mark.slow
def test_a_latency_target_is_measured_in_the_runtime():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(32, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 8, 1))
    x = (torch.randn(1, 32, 24, 24),)
    result = gs.factorize(wide.eval(), x, latency=0.6, method="spatial_svd", calibration=[torch.randn(4, 32, 24, 24)])
    note = next(n for n in result.notes if n.startswith("latency"))
    assert "ONNX Runtime, 1 thread" in note
    _, second = gs.benchmark(wide, result, example_inputs=x, runs=15).rows
    assert second.ratio < 0.85


def test_steps_compose_and_reload(tmp_path):
    source = net()
    data = batches()
    pruned = gs.prune(source, X, ratio=0.25, calibration=data)
    factored = gs.factorize(pruned, method="svd", rank={"3": 8, "6": 8}, calibration=data, runtime=None)
    sparse = gs.sparsify(factored, sparsity=0.5)
    quantised = gs.quantize(factored, X, calibration=data)
    for name, result in (("sparse", sparse), ("quantised", quantised)):
        back = gs.load(result.save(tmp_path / name), source)
        with torch.no_grad():
            assert torch.equal(back(data[0][0]), result.model(data[0][0]))
        assert result.plan.counts()["factorize"] == 2
        assert result.plan.counts()["keep"] > 0
    assert all(float((m.weight == 0).float().mean()) >= 0.4 for m in sparse.model[3])
    trained = gs.fit(factored, data, epochs=1)
    assert trained.plan == factored.plan
    assert not torch.equal(trained.model[3][0].weight, factored.model[3][0].weight)
    assert state_equal(gs.load(trained.save(tmp_path / "trained"), source), trained.model.eval())
    again = gs.prune(factored.model, X, ratio=0.25)
    assert again.proof.holds
    assert again.after.macs < factored.after.macs
    graph = gs.prune(source, X, ratio=0.25, form="graph")
    with pytest.raises(NothingToDo, match="as a graph"):
        gs.factorize(graph, rank=4)
    with pytest.raises(UsageError, match="prune would undo factorize"):
        gs.prune(factored, X, ratio=0.5)
    with pytest.raises(UsageError, match="factorize would undo sparsify"):
        gs.factorize(sparse, X, rank=2)


def test_networks_that_break_other_tools(case, tmp_path):
    model, inputs = case
    model.eval()
    outputs = {}
    for method in ("svd", "tucker2"):
        if method == "tucker2" and not any(s.dims.wide_axes and s.dims.ins * s.dims.outs > 1 for s in find_sites(model, inputs)[0]):
            with pytest.raises(NothingToDo, match="no layer is factorised"):
                gs.factorize(model, inputs, method=method, rank=2, runtime=None)
            continue
        result = gs.factorize(model, inputs, method=method, rank=2, runtime=None)
        back = gs.load(result.save(tmp_path / method), model)
        with torch.no_grad():
            call = (lambda m: m(**inputs)) if isinstance(inputs, dict) else (lambda m: m(*inputs))
            for a, b, c in zip(leaves(call(result.model)), leaves(call(back)), leaves(call(model)), strict=True):
                assert torch.equal(a, b)
                assert a.shape == c.shape
        outputs[method] = result.plan.counts()["factorize"]
        assert result.after.macs < result.before.macs
    assert outputs["svd"] >= 1


def leaves(out):
    return [t for t in _pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


class Shared(nn.Module):
    """One layer registered twice and called in between, two layers of one weight, attention, a subclass, hooks, a hidden layer."""

    def __init__(self):
        super().__init__()

        class Scaled(nn.Linear):
            def forward(self, x):
                return super().forward(x) * 2

        class Named(nn.Linear):
            def forward(self, x):
                return torch.nn.functional.linear(x, self.weight, self.bias)

        self.a = nn.Linear(32, 32)
        self.again = self.a
        self.tied, self.tied2 = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.tied2.weight = self.tied.weight
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.scaled, self.named = Scaled(32, 32), Named(32, 32)
        self.hooked = nn.Linear(32, 32)
        self.hooked.register_forward_hook(lambda m, i, o: o + 1)
        self.unused = nn.Linear(32, 32)
        self.read = nn.Linear(32, 32)
        self.hidden = nn.Linear(32, 32)
        self._pocket = [self.hidden]

    def forward(self, x):
        x = self.again(torch.relu(self.a(x)))
        x = self.tied2(self.tied(x)) + self.attention(x, x, x)[0]
        x = self.hooked(self.named(self.scaled(self.encoder(x))))
        return self._pocket[0](self.read(x) * self.read.weight.mean())


def test_what_cannot_be_exchanged_is_left_alone_with_the_reason():
    model = Shared().eval()
    x = (torch.randn(2, 5, 32),)
    sites, notes = find_sites(model, x)
    assert [s.name for s in sites] == ["a", "named"]
    assert len(sites[0].shapes) == 2
    text = "\n".join(notes)
    for reason, names in [
        ("tied", "tied, tied2"),
        ("reads its weight", "attention.out_proj"),
        ("something else", "scaled"),
        ("hooks", "hooked"),
        ("never ran", "unused"),
        ("not registered", "hidden"),
    ]:
        assert any(reason in n and names in n for n in notes), text
    result = gs.factorize(model, x, rank=4, method="svd", runtime=None)
    assert result.model.a is result.model.again
    assert isinstance(result.model.a, nn.Sequential)
    assert [e.module for e in result.plan] == ["a", "named"]


def test_weight_norm_goes_into_the_factors():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    result = gs.factorize(nn.Sequential(layer), (torch.zeros(1, 16),), method="svd", rank=2, runtime=None)
    want = torch.linalg.svdvals(layer.weight.detach())[:2]
    w = result.model[0][1].weight @ result.model[0][0].weight
    torch.testing.assert_close(torch.linalg.svdvals(w.detach())[:2], want)


def test_a_network_that_is_one_layer():
    result = gs.factorize(nn.Linear(32, 32), (torch.zeros(1, 32),), method="svd", rank=4, runtime=None)
    assert isinstance(result.model, nn.Sequential)
    assert result.plan.apply(nn.Linear(32, 32))(torch.zeros(1, 32)).shape == (1, 32)


def test_variational_bayes_finds_the_rank_of_a_synthetic_layer():
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(48, 5) @ torch.randn(5, 64) + 0.3 * torch.randn(48, 64))
    result = gs.factorize(layer, (torch.zeros(1, 64),), method="svd", rank="evbmf", runtime=None)
    assert [e.ranks for e in result.plan] == [(5,)]


def test_bad_input_is_one_line():
    source = net()
    for options, text in [
        ({}, "exactly one of rank"),
        ({"rank": 4, "macs": 0.5}, "exactly one of rank"),
        ({"macs": 1.5}, "fraction between 0 and 1"),
        ({"macs": "3ms"}, "fraction between 0 and 1"),
        ({"energy": 0.0}, "energy=0.0"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 1.5}, r"rank=1\.5"),
        ({"rank": "evbm"}, "rank='evbm'"),
        ({"rank": 4, "method": "svdd"}, "did you mean 'svd'"),
        ({"rank": 4, "round_to": 0}, "round_to=0"),
        ({"rank": 4, "runtime": "tensorrt"}, "runtime='tensorrt'"),
        ({"latency": 0.5, "runtime": None}, "needs runtime"),
        ({"energy": 0.9, "method": "cp"}, "no singular values"),
        ({"rank": (4, 4), "method": "svd"}, "svd takes 1"),
    ]:
        with pytest.raises(UsageError, match=text):
            gs.factorize(source, X, **options)
    with pytest.raises(SelectorError, match="did you mean"):
        gs.factorize(source, X, rank=4, ignore=["13"])
    with pytest.raises(SelectorError, match="matches no layer"):
        gs.factorize(source, X, rank={"7": 4})
    with pytest.raises(NothingToDo, match="these ranks save nothing"):
        gs.factorize(source, X, method="svd", rank=64, runtime=None)
    with pytest.raises(NothingToDo, match="no layer can be factorised"):
        gs.factorize(nn.ReLU(), X, rank=4)
    with pytest.raises(BudgetError, match="the lowest possible is"):
        gs.factorize(source, X, method="svd", macs=0.01, runtime=None)
    with pytest.raises(UsageError, match="the data is empty"):
        gs.factorize(source, X, method="svd", rank=4, calibration=[], runtime=None)
    broken = net()
    with torch.no_grad():
        broken[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"0\.weight holds 1 values"):
        gs.factorize(broken, X, rank=4)
