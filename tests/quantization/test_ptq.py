"""Quantisation after training as a whole: equalisation, rounding, bit widths, 16 bits, targets; saved, loaded, exported."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import gossamer as gs
from gossamer.errors import ExportError, SelectorError, UsageError
from gossamer.exporting import first_divergence
from gossamer.flow.measure import _check_faithful
from gossamer.quantization import trial
from gossamer.quantization.absorption import absorb_biases
from gossamer.quantization.allocation import allocate
from gossamer.quantization.calibration import observe, observe_again, parts
from gossamer.quantization.canonical import canonical
from gossamer.quantization.equalization import equalize, find_wires
from gossamer.quantization.graph import sample_bytes
from gossamer.quantization.observers import Channels
from gossamer.quantization.points import find_points
from gossamer.quantization.sensitivity import Sensitivity, divergence
from gossamer.trace.capture import capture


class Inverted(nn.Module):
    """Stem, two inverted residual blocks, classifier; channels of very different size."""

    def __init__(self, act=nn.ReLU6) -> None:
        super().__init__()

        def block(i, o, k=1, g=1, a=act):
            layers = [nn.Conv2d(i, o, k, padding=k // 2, groups=g, bias=False), nn.BatchNorm2d(o)]
            return nn.Sequential(*layers, *([a()] if a else []))

        self.stem = block(3, 12, 3)
        self.first = nn.Sequential(block(12, 32), block(32, 32, 3, 32), block(32, 12, a=None))
        self.second = nn.Sequential(block(12, 32), block(32, 32, 3, 32), block(32, 12, a=None))
        self.head, self.fc = block(12, 48), nn.Linear(48, 6)
        generator = torch.Generator().manual_seed(1)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = None
                m.weight.data.copy_(2 ** (4 * torch.rand(m.weight.shape, generator=generator) - 3))
                nn.init.normal_(m.bias, 0, 0.2, generator=generator)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.fc(self.head(x).mean((2, 3)))


DATA = [torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(i)) for i in range(4)]
INPUTS = (DATA[0][:1],)


def inverted(act=nn.ReLU6) -> nn.Module:
    torch.manual_seed(0)
    net = Inverted(act)
    with torch.no_grad():  # batch norms that know their inputs
        net(torch.cat(DATA))
    return net.eval()


def db(a: torch.Tensor, b: torch.Tensor) -> float:
    """Signal to noise of what differs between samples."""
    return float(10 * torch.log10((a - a.mean(0)).square().sum() / (a - b).square().sum()))


def sqnr(net: nn.Module, **options) -> float:
    with torch.no_grad():
        return db(net(DATA[3]), gs.quantize(net, INPUTS, calibration=DATA[:3], **options).model(DATA[3]))


@cache
def usual(**options):
    """The usual network quantised, and its signal to noise; computed once."""
    net = inverted()
    result = gs.quantize(net, INPUTS, calibration=DATA[:3], **options)
    with torch.no_grad():
        return result, db(net(DATA[3]), result.model(DATA[3]))


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
def test_equalisation_changes_weights_and_not_what_is_computed(act):
    net = inverted(act)
    graph = canonical(capture(net, INPUTS))
    wires = find_wires(graph)
    residual = next(w for w in wires if len(w.givers) == 3)  # the stem and what the two blocks add to it
    assert residual.frozen == ("a clip and a sum" if act is nn.ReLU6 else None)
    assert len(residual.readers) == 3
    assert sum(w.frozen is None for w in wires) == (5 if act is nn.ReLU6 else 6)
    before = {k: v.clone() for k, v in graph.state_dict().items()}
    seen = {n: Channels() for w in wires for n in w.nodes}
    values = Sensitivity(graph, [torch.cat(DATA)]).values
    for n, channels in seen.items():
        channels.update(values[n])
    assert equalize(graph, wires, seen, dict.fromkeys(before, 8)) > 3
    assert any(not torch.equal(v, before[k]) for k, v in graph.state_dict().items())
    with torch.no_grad():
        for x in DATA:
            assert db(net(x), graph(x)) > 90


def test_equalisation_helps_where_channels_differ():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 1)).eval()
    sizes = 2.0 ** -torch.arange(32).div(4, rounding_mode="floor")
    with torch.no_grad():  # channels of sizes from 1 to 1/128 that all matter alike
        net[0].weight.mul_(sizes[:, None, None, None]), net[0].bias.mul_(sizes), net[2].weight.div_(sizes[:, None, None])
    assert sqnr(net, equalize=True) > sqnr(net, equalize=False) + 10
    note = next(n for n in gs.quantize(net, INPUTS, calibration=DATA[:3]).notes if n.startswith("equalised"))
    assert "none" in note


def test_biases_are_absorbed_where_a_channel_never_falls_below_them(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    with torch.no_grad():
        net[0].bias[:2] += 100
        net[2].weight[:, :2] /= 20
    graph = canonical(capture(net, INPUTS))
    wires = find_wires(graph)
    values = Sensitivity(graph, [torch.cat(DATA)]).values
    seen = {n: Channels() for w in wires for n in w.nodes if "relu" in n.name}
    for n, channels in seen.items():
        channels.update(values[n])
    spread = {n: c.variance() for n, c in seen.items()}
    assert absorb_biases(graph, wires, seen) == 1  # what a padded convolution reads keeps its biases
    assert all(torch.equal(c.variance(), spread[n]) for n, c in seen.items())  # a channel that is moved varies as before
    with torch.no_grad():
        assert torch.allclose(graph(DATA[0]), net(DATA[0]), atol=1e-4)
        assert max(float(c.largest.max()) for c in seen.values()) < 20
    result = gs.quantize(net, INPUTS, calibration=DATA[:3])
    assert "biases of 1 layers absorbed by the layers that read them" in result.notes
    assert sqnr(net) > sqnr(net, equalize=False) + 6
    assert torch.equal(gs.load(result.save(tmp_path / "run"), net)(DATA[3]), result.model(DATA[3]))


@pytest.mark.parametrize("far", [0.0, 3000.0])
def test_variances_of_channels_equal_numpy_in_any_number_of_batches(far):
    x = torch.randn(12, 3, 5, 4) + far
    seen = Channels()
    for part in x.split([5, 1, 6]):
        seen.update(part)
    want = x.double().numpy().var((0, 2, 3))
    np.testing.assert_allclose(seen.variance().numpy(), want, rtol=1e-3)


def test_samples_run_few_at_a_time_give_the_same_steps_and_as_good_a_network(monkeypatch):
    net = inverted()
    graph, leaves = canonical(capture(net, INPUTS)), [torch.cat(DATA)]
    options = [{"observer": "mse"}, {"observer": "moving_average"}]
    whole = [gs.quantize(net, INPUTS, calibration=DATA[:3], equalize=False, **o) for o in options]
    one = parts(graph, leaves, 1000)
    monkeypatch.setattr("gossamer.quantization.calibration._PART_BYTES", 2 * 12 * 16 * 16 * 4)
    few = parts(graph, leaves, 1000)
    assert len(one) == 1
    assert len(few) > 3
    assert torch.equal(torch.cat([p[0] for p in few]), leaves[0])
    for o, expected, spread in zip(options, whole, (0.02, 0.0), strict=True):  # extremes of a batch are those of all of it
        found = gs.quantize(net, INPUTS, calibration=DATA[:3], equalize=False, **o)
        steps = [[e.step for e in r.plan.edits if e.kind == "quantize_activation"] for r in (found, expected)]
        assert steps[0] == pytest.approx(steps[1], rel=spread, abs=0)
        with torch.no_grad():
            assert db(net(DATA[3]), found.model(DATA[3])) > db(net(DATA[3]), expected.model(DATA[3])) - 2


@pytest.mark.parametrize(("share", "taken"), [(0.95, False), (0.85, True)])
def test_equalisation_has_to_be_worth_a_tenth(share, taken, monkeypatch):
    noises = itertools.chain([1.0], itertools.repeat(share))
    monkeypatch.setattr(trial, "_noise", lambda *args: next(noises))
    note = next(n for n in gs.quantize(inverted(), INPUTS, calibration=DATA[:3]).notes if n.startswith("equalised"))
    assert note.startswith("equalised across layers: 0 of") is not taken


def test_a_value_that_merges_the_batch_with_something_counts_whole():
    class Windows(nn.Module):
        def forward(self, x):
            return (x.reshape(-1, 8) * 2).reshape(-1, 32)

    graph = capture(Windows(), (torch.zeros(3, 4, 8),))
    assert set(sample_bytes(graph)) == {32 * 4}


def test_a_moving_average_counts_the_batches_as_they_were_given_again(monkeypatch):
    graph = canonical(capture(inverted(), INPUTS))
    points = find_points(graph).activations
    monkeypatch.setattr("gossamer.quantization.calibration._PART_BYTES", 2 * 12 * 16 * 16 * 4)
    first, leaves = observe(graph, points, DATA[:3], INPUTS, whole=True)
    again = observe_again(graph, points, leaves, first.batch)
    wanted, found, parted = (
        [h.range("moving_average") for h in hs.values()] for hs in (first.histograms, again, observe_again(graph, points, leaves))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.abs(np.subtract(parted, wanted)).max() > 1e-3


def test_wires_that_cannot_be_scaled_say_why():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Hardswish(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    reasons = {str(w.givers[0].args[1]): w.frozen for w in find_wires(canonical(capture(net, INPUTS)))}
    assert reasons["_0_weight" if "_0_weight" in reasons else next(iter(reasons))] == "read by hardswish"
    assert list(reasons.values()).count(None) == 1
    assert "read by output" in reasons.values()


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_better_rounding_is_better_reproducible_and_loads_bit_for_bit(rounding, tmp_path):
    result, found = usual(weight_bits=4, rounding=rounding)
    again = gs.quantize(inverted(), INPUTS, calibration=DATA[:3], weight_bits=4, rounding=rounding)
    assert found > usual(weight_bits=4)[1] + 0.7
    with torch.no_grad():
        assert again.plan == result.plan
        assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), result.model.state_dict().values(), strict=True))
        loaded = gs.load(result.save(tmp_path / "run"), inverted())
        assert torch.equal(loaded(DATA[3]), result.model(DATA[3]))
    steps = {e.tensor: e.steps for e in result.plan if e.kind == "quantize_weight"}
    state = result.model.state_dict()
    assert all(torch.equal(state[n + "_step"], torch.tensor(s)) for n, s in steps.items())


def test_below_8_bits_scales_are_tried_with_the_rounding_that_follows():
    def tried(rounding: str) -> float:
        notes = usual(weight_bits=3, rounding=rounding)[0].notes
        return float(next(n for n in notes if n.startswith("equalised")).partition("with none ")[2].partition(",")[0])

    assert tried("gptq") < 0.7 * tried("nearest")


def test_biases_from_batch_norms_come_close_to_measured_ones():
    without, analytic = (usual(weight_bits=4, bias_correction=b) for b in (False, "analytic"))
    assert usual(weight_bits=4)[1] > analytic[1] > without[1]
    assert any("corrected from batch norms" in n for n in analytic[0].notes)


def test_patterns_give_weights_their_bits():
    result = gs.quantize(inverted(), INPUTS, calibration=DATA[:3], weight_bits={"stem": 8, "fc.weight": 8, "*": 3})
    bits = {e.tensor: e.bits for e in result.plan if e.kind == "quantize_weight"}
    assert bits.pop("stem.0.weight") == 8
    assert bits.pop("fc.weight") == 8
    assert set(bits.values()) == {3}
    with pytest.raises(SelectorError, match=r"stemm.*did you mean"):
        gs.quantize(inverted(), INPUTS, calibration=DATA[:3], weight_bits={"stemm.0.weight": 8})


def test_an_allocation_is_the_best_of_all():
    rng = np.random.default_rng(0)
    widths = (8, 6, 4, 2)
    losses = {i: np.sort(rng.exponential(1, 4)).tolist() for i in range(5)}
    sizes = {i: int(rng.integers(10, 100)) for i in range(5)}
    found = allocate(losses, sizes, 4.5, widths)
    total = sum(sizes.values())

    def loss(choice):
        return sum(losses[i][widths.index(b)] for i, b in choice.items())

    everything = (dict(enumerate(c)) for c in itertools.product(widths, repeat=5))
    best = min(loss(c) for c in everything if sum(sizes[i] * b for i, b in c.items()) <= 4.5 * total)
    assert loss(found) == pytest.approx(best)
    assert sum(sizes[i] * b for i, b in found.items()) <= 4.5 * total


def test_sensitivity_is_the_whole_network_s_divergence():
    net = inverted()
    graph = canonical(capture(net, INPUTS))
    runs = Sensitivity(graph, [DATA[0]])
    weight = next(n for n in graph.graph.nodes if n.op == "get_attr" and n.target == "second.1.0.weight")
    got = runs.loss(weight, lambda w: w * 1.1)
    changed = copy.deepcopy(graph)
    with torch.no_grad():
        changed.second.get_submodule("1.0").weight.mul_(1.1)
        p, q = graph(DATA[0]).double().softmax(1), changed(DATA[0]).double().softmax(1)
    assert got == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-3)
    assert divergence([torch.full((2, 2), 1.0)], [torch.full((2, 2), float("nan"))]) == float("inf")


def test_an_average_is_met_and_beats_the_same_bits_everywhere():
    net = inverted()
    result, found = usual(average_bits=4)
    edits = [e for e in result.plan if e.kind == "quantize_weight"]
    sizes = {k: v.numel() for k, v in net.state_dict().items()}
    assert sum(sizes[e.tensor] * e.bits for e in edits) <= 4 * sum(sizes[e.tensor] for e in edits)
    assert found > usual(weight_bits=4)[1]
    both = gs.quantize(net, INPUTS, calibration=DATA[:3], average_bits=(5, 6.5))
    assert len({e.bits for e in both.plan if e.kind == "quantize_activation"}) > 1
    with pytest.raises(UsageError, match="average_bits=9"):
        gs.quantize(net, INPUTS, calibration=DATA[:3], average_bits=9)


def test_sixteen_bits_where_asked_or_where_eight_do_harm(tmp_path):
    result, found = usual(activation_bits=16)
    assert found > usual()[1] + 3
    with torch.no_grad():
        assert torch.equal(gs.load(result.save(tmp_path / "run"), inverted())(DATA[3]), result.model(DATA[3]))
    assert gs.export(result, tmp_path / "net.onnx", calibration=DATA).sqnr_db > 40
    assert any("16 bits" in n and "float" in n for n in result.notes)

    class Spiked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
            with torch.no_grad():  # one channel a thousand times as large, which the next layer takes out again
                self.a.weight[0] *= 1000
                self.b.weight[:, 0] /= 1000
                self.c.weight *= 10

        def forward(self, x):
            return self.c(nn.functional.hardswish(self.b(nn.functional.silu(self.a(x))))[:, :, 4, 4])

    torch.manual_seed(0)
    spiked = Spiked().eval()
    chosen = gs.quantize(spiked, INPUTS, calibration=DATA[:3], activation_bits="auto", observer="minmax")
    bits = {e.point: e.bits for e in chosen.plan if e.kind == "quantize_activation"}
    assert set(bits.values()) == {8, 16}
    assert sqnr(spiked, activation_bits="auto", observer="minmax") > sqnr(spiked, observer="minmax") + 3


def test_avx2_for_latency_takes_seven_bits_whose_sums_cannot_saturate():
    result = gs.quantize(inverted(), INPUTS, calibration=DATA[:3], target="avx2", prefer="latency", rounding="gptq")
    codes = [result.model.state_dict()[e.tensor] for e in result.plan if e.kind == "quantize_weight"]
    assert all(c.dtype == torch.int8 and c.min() >= -64 and c.max() <= 63 for c in codes)
    assert 2 * 255 * 64 < 2**15


@pytest.mark.slow
def test_for_latency_kinds_stay_float_only_by_measurement():
    from gossamer.quantization.target import resolve

    target = resolve("auto").name
    result = gs.quantize(inverted(), INPUTS, calibration=DATA[:3], target=target, prefer="latency")
    note = next(n for n in result.notes if n.startswith("measured for latency"))
    assert "depthwise convolutions" in note
    kept = [e for e in result.plan if e.kind == "quantize_weight"]
    assert (len(kept) == 9) == ("nothing is faster in float" in note)


def test_the_first_layer_that_diverges_is_named(tmp_path):
    result = usual()[0]
    file = gs.export(result, tmp_path / "net.onnx", calibration=DATA)
    assert first_divergence(result.model, file.path, (DATA[3],)) is None
    model = onnx.load(file.path)
    for t in model.graph.initializer:
        if t.name in ("second.0.0.weight", "second.2.0.weight"):
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t)[::-1].copy(), t.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    found = first_divergence(result.model, tmp_path / "wrong.onnx", (DATA[3],))
    assert found is not None
    assert found[0] == "second.0.0.weight"
    job = SimpleNamespace(example_inputs=INPUTS)
    labels = torch.zeros(16, dtype=torch.long)
    near, far = (SimpleNamespace(accuracy=SimpleNamespace(value=v), n=16) for v in (0.9, 0.5))
    for path, there in ((file.path, far), (tmp_path / "wrong.onnx", near)):  # integers that agree, or top-1 that does
        _check_faithful(result, path, [(DATA[3], labels)], near, there, job)
    with pytest.raises(ExportError, match=r"50\.0% top-1.*90\.0%.*second\.0\.0\.weight"):
        _check_faithful(result, tmp_path / "wrong.onnx", [(DATA[3], labels)], near, far, job)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounding": "adaroud"}, "did you mean 'adaround'"),
        ({"observer": "kl"}, "entropy"),
        ({"granularity": "group"}, "channel, tensor"),
        ({"activation_bits": 12}, "16, or 'auto'"),
        ({"bias_correction": "exact"}, "analytic"),
        ({"prefer": "speed"}, "latency"),
        ({"average_bits": 4, "weight_bits": 4}, "not both"),
        ({"weight_bits": {"*": 9}}, r"weight_bits=9 for '\*'"),
    ],
)
def test_options_out_of_range_are_one_line(options, words):
    with pytest.raises(UsageError, match=words) as e:
        gs.quantize(inverted(), INPUTS, calibration=DATA[:1], **options)
    assert "\n" not in str(e.value)


def test_a_step_for_the_tensor_is_worse_than_one_for_each_channel():
    assert usual(granularity="tensor", weight_bits=4)[1] < usual(weight_bits=4)[1]


@pytest.mark.slow
def test_cases_take_every_option(case, tmp_path):
    net, inputs = case
    net.eval()
    try:
        capture(net, inputs)
    except ExportError:  # it says why: test_cases_quantise_and_export_or_say_why_not
        return
    result = gs.quantize(net, inputs, calibration=[inputs], rounding="gptq", weight_bits=4)
    loaded = gs.load(result.save(tmp_path / "run"), net)
    with torch.no_grad():
        ours, theirs = (torch.utils._pytree.tree_leaves(m(*inputs)) for m in (result.model, loaded))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
