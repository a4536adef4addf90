"""Ranges by the outputs against exact derivatives, brute force and what the network measures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.quantization import influence as module
from gossamer.quantization.calibration import observe_again
from gossamer.quantization.canonical import canonical
from gossamer.quantization.edits import activation_edit
from gossamer.quantization.influence import Influence, influences
from gossamer.quantization.observers import rounding_error
from gossamer.quantization.points import find_points
from gossamer.quantization.ranges import output_noise, ranges_by_outputs
from gossamer.quantization.reconstruction import borne_out, seen_range
from gossamer.trace.capture import capture


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Saturated(nn.Module):
    """One channel a hundred times as large as the others, which a clip right after the next layer takes no notice of."""

    def __init__(self, step: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.step = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Linear(16, 5), step
        with torch.no_grad():
            self.a.bias[0] = 60.0
            self.a.weight[0] *= 30
            self.b.weight[8:, 0], self.b.weight[:8, 0] = 0.0, 1.0

    def forward(self, x):
        x = self.a(x)
        far = (x[:, 0] > 50.0).float().mean((1, 2))
        y = self.c(nn.functional.relu6(self.b(x)).mean((2, 3)))
        return y + self.step * far[:, None] if self.step else y


DATA = [normal(16, 3, 6, 6, seed=i) for i in range(4)]


def graph_of(net: nn.Module):
    graph = canonical(capture(net.eval(), (DATA[0][:1],)))
    points = find_points(graph)
    leaves = [torch.cat(DATA[:3])]
    return graph, points, observe_again(graph, points.activations, leaves), leaves


def test_the_noise_is_that_of_the_exact_derivative():
    net = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 7), nn.GELU(), nn.Linear(7, 4)).eval()
    x = normal(1, 6)
    graph = canonical(capture(net, (x,)))
    points = find_points(graph)
    copies = [x.expand(3000, -1).clone()]
    found = influences(graph, observe_again(graph, points.activations, copies), copies)
    node = list(points.activations)[1]
    with torch.no_grad():
        h = net[1](net[0](x))
    jacobian = torch.autograd.functional.jacobian(lambda h: net[4](net[3](net[2](h))), h)[0, :, 0]
    with torch.no_grad():
        size = net(x).square().sum()
    for low, high in ((-0.2, 0.4), (-0.5, 1.0), (-0.3, 0.2)):
        interval = torch.tensor([low]), torch.tensor([high])
        exact = float((jacobian @ rounding_error(h[0], *interval, 3)[0]).square().sum() / size)
        got = float(found[node].noise(*interval, 3, found[node].sums()).mean(1))
        assert got == pytest.approx(exact, rel=0.1)


def test_what_no_output_depends_on_sets_no_range():
    graph, points, histograms, leaves = graph_of(Saturated())
    wide = next(n for n, h in histograms.items() if h.high > 60)
    before, note = histograms[wide].range("mse"), ranges_by_outputs(graph, points, histograms, leaves, 8)
    after = histograms[wide].range("output")
    assert after[1] < before[1] / 3
    assert "by the outputs" in note
    noise = output_noise(graph, {o: {wide: activation_edit("", histograms[wide], o, 8)} for o in ("mse", "output")}, [DATA[3]])
    assert noise["output"] < noise["mse"] / 4


def test_the_whole_network_has_less_noise_than_with_squared_errors():
    net = Saturated().eval()

    def sqnr(**options) -> float:
        with torch.no_grad():
            a, b = net(DATA[3]), gs.quantize(net, (DATA[0][:1],), calibration=DATA[:3], target="vnni", **options).model(DATA[3])
        return float(10 * torch.log10((a - a.mean(0)).square().sum() / (a - b).square().sum()))

    assert sqnr(equalize=False) > sqnr(equalize=False, observer="mse") + 4
    assert sqnr() > sqnr(observer="mse")


def test_what_a_derivative_does_not_see_is_found_by_trying():
    graph, points, histograms, leaves = graph_of(Saturated(step=100.0))
    note = ranges_by_outputs(graph, points, histograms, leaves, 8)
    assert "ranges of 0 of" in note
    assert all(h.range("output") == h.range("mse") for h in histograms.values())


def test_a_range_that_half_of_the_samples_contradict_is_not_taken():
    x, gradient = normal(64, 500).abs(), torch.ones(64, 500)
    x[:, 0] = 10.0
    gradient[:, 0] = torch.where(torch.arange(64) % 2 == 0, 0.0, 30.0)  # of no influence in every other sample
    seen, agreed = Influence(0.0, 10.0), Influence(0.0, 10.0)
    seen.update(x, gradient)
    agreed.update(x, torch.where(x == 10.0, 0.0, gradient))
    assert seen.least((0.0, 10.0), 8)[1] == pytest.approx(10.0, rel=0.15)
    assert agreed.least((0.0, 10.0), 8)[1] < 6
    assert agreed.least((0.0, 10.0), 8, slice(0, 4)) == (0.0, 10.0)  # too few samples


def test_a_network_without_a_derivative_has_the_least_squared_error(monkeypatch):
    def none(*args, **options):
        raise RuntimeError("derivative for aten::x is not implemented")

    net = Saturated().eval()
    monkeypatch.setattr(module.torch.autograd, "grad", none)
    found = gs.quantize(net, (DATA[0][:1],), calibration=DATA[:3])
    assert any("cannot be derived" in n for n in found.notes)
    monkeypatch.undo()
    usual = gs.quantize(net, (DATA[0][:1],), calibration=DATA[:3], observer="mse")
    assert [e for e in found.plan if e.kind == "quantize_activation"] == [e for e in usual.plan if e.kind == "quantize_activation"]
    assert all(p.grad is None for p in net.parameters())


def test_biases_take_only_means_that_the_halves_of_the_samples_agree_on():
    graph = canonical(capture(Saturated().eval(), (DATA[0][:1],)))
    layer = next(n for n in graph.graph.nodes if n.target == torch.ops.aten.conv2d.default)
    missing = torch.zeros(8, 3, 2, 2)
    missing[:, 0] = 0.5  # everywhere
    missing[0, 1] = 8.0  # in one sample
    missing[:, 2] = torch.tensor([1.0, -0.9] * 4)[:, None, None]
    assert borne_out(layer, [missing]).tolist() == [0.5, 0.0, 0.0]
    assert borne_out(layer, [missing[:1]]).tolist() == [0.5, 8.0, 1.0]
    weights = torch.ones(8, 2, 2)
    weights[:, 0] = 3.0
    missing[:, 1, 0] = 1.0
    missing[0, 1] = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert borne_out(layer, [missing], [weights]).tolist() == pytest.approx([0.5, 0.75, 0.0])


def test_what_a_layer_is_cut_off_at_is_the_clip_and_the_range_that_follow():
    result = gs.quantize(Saturated().eval(), (DATA[0][:1],), calibration=DATA[:3], equalize=False)
    a, b, c = (n for n in result.model.graph.nodes if n.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default))
    edits = {e.point: e for e in result.plan if e.kind == "quantize_activation"}
    edit = edits["a:conv2d:0"]
    assert seen_range(a) == pytest.approx((-edit.zero_point * edit.step, (255 - edit.zero_point) * edit.step))
    low, high = seen_range(b)
    assert (low, high <= 6.001) == (0.0, True)
    assert seen_range(c) == (-float("inf"), float("inf"))
