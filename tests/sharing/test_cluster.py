"""Codebooks chosen after training: what is shared, what is left alone, and that the plan says exactly what was done."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gossamer as gs
from conftest import SHARED
from gossamer.errors import NothingToDo, SelectorError, UsageError
from gossamer.plan import AsGraph, Plan
from gossamer.sharing import cluster, kmeans_1d
from gossamer.sources.layer_weights import layer_weights


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24 * 16, 10)
    ).eval()


def equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_each_weight_takes_the_values_of_its_exact_codebook_and_the_original_stays():
    net = convolutional()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    result = cluster(net, bits=3)
    for name, w in layer_weights(net).items():
        centroids, cost = kmeans_1d(w.detach().numpy(), 8)
        shared = result.model.get_parameter(name).detach()
        assert np.array_equal(np.unique(shared.numpy()), centroids.astype(np.float32))
        assert float(((shared - w.detach()) ** 2).double().sum()) == pytest.approx(cost, rel=1e-4)
    assert torch.equal(result.model[3].bias, before["3.bias"])
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert equal(result.plan.apply(net), result.model)


def test_zeros_stay_zero_and_take_a_code_but_no_value():
    net = nn.Linear(40, 40)
    with torch.no_grad():
        net.weight[torch.rand(40, 40) < 0.5] = 0
    result = cluster(net, bits=4)
    (edit,) = result.plan.edits
    assert edit.zeros and len(edit.codebooks[0]) == 15
    assert torch.equal(result.model.weight == 0, net.weight == 0)
    assert len(result.model.weight.unique()) == 16


def test_a_few_zeros_are_values_like_others():
    net = nn.Linear(40, 40)
    with torch.no_grad():
        net.weight[0, :10] = 0
    (edit,) = cluster(net).plan.edits
    assert not edit.zeros and len(edit.codebooks[0]) == 16


def test_groups_have_codebooks_of_their_own():
    net = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 30))
    with torch.no_grad():
        net[0].weight[20:] *= 100
        net[0].weight[:20][torch.rand(20, 40) < 0.4] = 0  # the other half has no zero
    result = cluster(net, bits=3, groups=4)
    first, second = result.plan.edits
    assert [len(b) for b in first.codebooks] == [7, 7, 7, 7] and [len(b) for b in second.codebooks] == [8]
    assert all(max(map(abs, book)) < 0.2 for book in first.codebooks[:2]) and max(map(abs, first.codebooks[3])) > 1
    assert any("one codebook and not 4" in n and "1.weight" in n for n in result.notes)
    for block, codebook in zip(result.model[0].weight.detach().split(10), first.codebooks, strict=True):
        assert {v for v in block.unique().tolist() if v} == set(codebook)
    assert equal(result.plan.apply(net), result.model)


def test_a_block_of_zeros_stays_zero():
    net = nn.Linear(40, 40)
    with torch.no_grad():
        net.weight[:20] = 0
    result = cluster(net, bits=2, groups=2)
    assert not result.model.weight[:20].any() and result.model.weight[20:].all()


@pytest.mark.parametrize(("scope", "sets"), [("tensor", 3), ("shape", 2), ("network", 1)])
def test_scopes(scope, sets):
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 10))
    result = cluster(net, scope=scope)
    assert len(result.plan) == sets
    assert sorted(t for e in result.plan for t in e.tensors) == ["0.weight", "1.weight", "2.weight"]
    for edit in result.plan:
        values = torch.cat([result.model.get_parameter(t).flatten() for t in edit.tensors]).unique().tolist()
        assert tuple(values) == edit.codebooks[0]
    assert equal(result.plan.apply(net), result.model)


def test_what_does_not_pay_is_left_alone_and_said():
    net = nn.ModuleDict({"a": nn.Linear(30, 30), "b": nn.Linear(3, 3), "signs": nn.Linear(30, 30), "table": nn.Embedding(40, 9)})
    with torch.no_grad():
        net["signs"].weight.sign_()
    result = cluster(net)
    assert [e.tensors for e in result.plan] == [("a.weight",)]
    for words in ("fewer than 64 entries for each codebook: b.weight", "no more distinct values", "no weights of layers: table.weight"):
        assert any(words in n for n in result.notes), words


def test_shared_twice_is_nothing_to_do():
    with pytest.raises(NothingToDo, match=r"no more distinct values than a codebook has: 0\.weight"):
        cluster(cluster(nn.Sequential(nn.Linear(20, 20))))


def test_ignored_by_path_name_pattern_or_another_name():
    net = nn.Sequential(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)), nn.Linear(20, 20), nn.Linear(20, 20))
    net[2].weight = net[1].weight
    shared = lambda *ignore: [t for e in cluster(net, ignore=ignore).plan for t in e.tensors]  # noqa: E731
    assert shared("0") == ["1.weight"]
    assert shared("0.0.weight", "0.1") == ["1.weight"]
    assert shared("0.*") == ["1.weight"]
    assert shared("2") == ["0.0.weight", "0.1.weight"]
    with pytest.raises(SelectorError, match=r"'0.0.wieght' matches no weight of a layer; did you mean '0.0.weight'"):
        shared("0.0.wieght")
    with pytest.raises(NothingToDo, match=r"ignored: 0\.0\.weight"):
        shared("*")


def test_a_tied_weight_stays_tied():
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    net[1].weight = net[0].weight
    result = cluster(net)
    assert result.model[0].weight is result.model[1].weight
    assert len(result.plan) == 1


def test_a_result_is_continued():
    net, inputs = convolutional(), (torch.randn(2, 3, 8, 8),)
    pruned = gs.prune(net, inputs, ratio=0.3)
    result = cluster(pruned, bits=5, scope="network")
    assert result.plan.edits[: len(pruned.plan)] == pruned.plan.edits and len(result.plan) == len(pruned.plan) + 1
    assert result.proof is pruned.proof and result.before == pruned.before and result.after == pruned.after
    assert result.notes[: len(pruned.notes)] == pruned.notes
    assert equal(result.plan.apply(net), result.model)


def test_a_captured_graph_is_continued():
    net, inputs = convolutional(), (torch.randn(2, 3, 8, 8),)
    graph = gs.prune(net, inputs, ratio=0.3, form="graph")
    assert any(isinstance(e, AsGraph) for e in graph.plan)
    result = cluster(graph)
    assert equal(result.plan.apply(net), result.model)


def test_quantised_networks_are_refused():
    net, inputs = convolutional(), (torch.randn(2, 3, 8, 8),)
    quantised = gs.quantize(net, inputs, calibration=[inputs[0]])
    with pytest.raises(UsageError, match="would undo quantize, which was done already"):
        cluster(quantised)


def test_profiles_with_and_without_inputs():
    net = convolutional()
    sizes, measured = cluster(net), cluster(net, example_inputs=(torch.zeros(1, 3, 8, 8),))
    assert "not measured" in str(sizes) and not sizes.after.measured
    assert measured.before.macs == measured.after.macs > 0 and "not measured" not in str(measured)
    assert sizes.before.params == measured.before.params and sizes.before.weight_bytes == measured.before.weight_bytes
    entries = [w.numel() for w in layer_weights(net).values()]
    assert any(f"{sum(-(-n // 2) for n in entries) + 3 * 16 * 4:,} bytes as codes" in n for n in sizes.notes)


def test_progress_counts_codebooks():
    seen = []
    cluster(convolutional(), groups=2, bits=2, progress=lambda done, total: seen.append((done, total)))
    assert list(dict.fromkeys(seen)) == [(i, 6) for i in range(7)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"groups": 0}, "groups=0"),
        ({"scope": "tensors"}, "did you mean 'tensor'"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(UsageError, match=words):
        cluster(nn.Linear(20, 20), **options)


def test_nan_is_named():
    net = nn.Sequential(nn.Linear(20, 20))
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"0\.weight holds NaN"):
        cluster(net)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.LSTM(20, 20),
        lambda: nn.MultiheadAttention(20, 4),
        lambda: nn.Bilinear(10, 10, 10),
        lambda: parametrizations.weight_norm(nn.Linear(20, 20)),
        lambda: parametrizations.spectral_norm(nn.Conv1d(20, 20, 3)),
        lambda: nn.Linear(20, 20).half(),
        lambda: nn.Linear(20, 20).bfloat16(),
        lambda: nn.Linear(20, 20).double(),
    ],
)
def test_every_kind_of_layer_and_precision_reloads(layer, tmp_path):
    net = nn.Sequential(layer())
    result = cluster(net)
    assert {t for e in result.plan for t in e.tensors} == set(layer_weights(net))
    assert all(len(w.unique()) <= 16 for w in layer_weights(result.model).values())
    assert equal(result.plan.apply(net), result.model)
    assert equal(gs.load(result.save(tmp_path / "run"), net), result.model)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_older_weight_norm_is_shared_before_its_norm():
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(20, 20)))
    result = cluster(net)
    assert [e.tensors for e in result.plan] == [("0.weight_v",)]
    x = torch.ones(1, 20)
    with torch.no_grad():
        v = result.model[0].weight_v
        expected = nn.functional.linear(x, net[0].weight_g * v / v.norm(dim=1, keepdim=True), net[0].bias)
        assert torch.allclose(result.model(x), expected, rtol=1e-5)


def networks():
    path = SHARED / "cases" / "networks.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("networks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = networks()


@pytest.mark.skipif(CASES is None, reason="the cases are not beside this checkout")
@pytest.mark.parametrize("make", [] if CASES is None else CASES.ALL, ids=lambda f: f.__name__)
def test_cases_are_shared_saved_and_loaded_bit_for_bit(make, tmp_path):
    net, inputs = make()
    net.eval()
    result = cluster(net, bits=3, example_inputs=inputs)
    loaded = gs.load(result.save(tmp_path / "run"), net)
    assert equal(loaded, result.model) and equal(Plan.load(tmp_path / "run" / "plan.json").apply(net), result.model)
    for edit in result.plan:
        for name in edit.tensors:
            assert len(result.model.get_parameter(name).unique()) <= 8
    with torch.no_grad():
        for a, b in zip(*(torch.utils._pytree.tree_leaves(m(*inputs)) for m in (loaded, result.model)), strict=True):
            assert torch.equal(a, b)
