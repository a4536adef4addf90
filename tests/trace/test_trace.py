"""Tracing: costs against published counts, classes against brute force, reasons for what is frozen, and nothing left changed."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchvision
from torch import nn
from torch.func import functional_call

from gossamer.errors import TraceError
from gossamer.trace import channels, costs, trace


def mobilenet() -> nn.Module:
    return torchvision.models.mobilenet_v2(weights=None).eval()


@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [("mobilenet_v2", 300_774_272, 3_504_872), ("resnet18", 1_814_073_344, 11_689_512)],
)
def test_costs_are_the_published_ones(name, macs, params):
    profile = costs(torchvision.models.get_model(name, weights=None), (torch.zeros(1, 3, 224, 224),))
    assert (profile.macs, profile.params) == (macs, params)
    assert sum(layer.macs for layer in profile.layers) == macs
    assert profile == trace(torchvision.models.get_model(name, weights=None), (torch.zeros(1, 3, 224, 224),)).profile


def test_transposed_and_grouped_convolutions_are_counted_as_loops_would():
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.Conv2d(6, 9, 3, groups=3))
    x = torch.zeros(1, 4, 5, 5)
    up = net[0](x)
    down = net[1](up)
    want = 5 * 5 * 4 * (6 // 2) * 9 + down.numel() * (6 // 3) * 9
    assert costs(net, (x,)).macs == want


def test_peak_activation_bytes_of_a_chain_is_the_largest_pair():
    net = nn.Sequential(nn.Linear(10, 100), nn.Linear(100, 50), nn.Linear(50, 1))
    assert costs(net, (torch.zeros(1, 10),)).peak_activation_bytes == 4 * (100 + 50)


def test_peak_activation_bytes_is_what_a_planner_shares():
    class Net(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.stem, self.a, self.b, self.inplace = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), inplace
            self.norm, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            y = self.norm(self.b(self.a(x).relu().sigmoid()))
            if self.inplace:
                y += x
            else:
                y = y + x
            return self.head(y.tanh())

    unit = 4 * 16 * 16
    for inplace in (False, True):  # x and one more tensor: the last convolution adds to x
        assert costs(Net(inplace), (torch.zeros(1, 3, 16, 16),)).peak_activation_bytes == (8 + 8) * unit

    class Kept(nn.Module):
        def forward(self, x):
            y = x.sigmoid()
            return y * y.tanh() + y.exp()

    assert costs(Kept(), (torch.zeros(10),)).peak_activation_bytes == 4 * 10 * 2  # tanh, and exp over y


def test_a_residual_couples_its_branches_and_a_depthwise_convolution_its_sides():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.dw, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.a(x)
            return self.head(x + self.b(self.dw(x).relu()))

    found = channels(Net(), (torch.zeros(1, 3, 6, 6),))
    assert [(g.name, len(g.classes)) for g in found.groups] == [("a", 8)]
    group = found.groups[0]
    assert {a.tensor for a in found.axes_of(group)} >= {"a.weight", "a.bias", "dw.weight", "dw.bias", "b.weight", "b.bias", "head.weight"}
    reasons = {g.name: g.frozen for g in found.frozen}
    assert "input" in reasons["a#2"] or "input" in reasons["a"]
    assert reasons["head"] == "the network's output"


def test_flatten_gives_each_channel_its_features():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 16, 2))
    found = channels(net, (torch.zeros(1, 3, 6, 6),))
    (group,) = found.groups
    axis = next(a for a in found.axes if a.tensor == "2.weight" and a.dim == 1)
    assert torch.equal(axis.labels, group.classes.repeat_interleave(16))


def test_concatenation_keeps_its_parts_apart_and_halves_stay_equal():
    class Cat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 2, 1)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    assert [(g.name, len(g.classes)) for g in channels(Cat(), (torch.zeros(1, 3, 4, 4),)).groups] == [("a", 4), ("b", 6)]

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.p, self.q = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            left, right = self.a(x).chunk(2, 1)
            return self.p(left) * self.q(right)

    (group,) = channels(Halves(), (torch.zeros(1, 3, 4, 4),)).groups
    assert len(group.classes) == 4
    assert group.width == 2


def test_grouped_convolution_loses_equally_many_of_each_group():
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 1, groups=4), nn.Conv2d(8, 2, 1))
    found = channels(net, (torch.zeros(1, 3, 4, 4),))
    assert [(g.name, len(g.classes), g.width) for g in found.groups] == [("0", 3, 4), ("1", 2, 4)]


def test_an_operation_without_a_rule_freezes_and_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.odd, self.b, self.c = nn.Linear(4, 6), Odd(), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.c(self.b(self.odd(self.a(x))).relu())

    class Odd(nn.Module):
        def forward(self, x):
            return torch.fft.fft(x).real

    found = channels(Net(), (torch.zeros(3, 4),))
    assert [g.name for g in found.groups] == ["b"]
    reason = next(g.frozen for g in found.frozen if g.name == "a")
    assert "fft" in reason
    assert "odd" in reason


def test_a_norm_over_channels_is_inexact_and_batch_norm_is_not():
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    (group,) = channels(net, (torch.zeros(2, 4),)).groups
    assert "native_layer_norm" in group.inexact[0]
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    (group,) = channels(net, (torch.zeros(2, 4),)).groups
    assert group.inexact == ()


def test_classes_against_brute_force():
    """Which single output channels of the first layer can be zeroed alone without changing the output, given zeroed consumers?"""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x):
            x = self.a(x)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            return self.c(self.b(x).relu())

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 2, 3, 3)
    found = channels(net, (x,))
    state = {n: p.detach() for n, p in net.named_parameters()}
    for group, classes in itertools.product(found.groups, range(2)):
        removed = torch.zeros(found.num_classes, dtype=torch.bool)
        removed[group.classes[classes]] = True
        zeroed = {}
        noise = dict(state)
        for (tensor, dim), keep in found.keep_masks(removed).items():
            view = [1] * state[tensor].dim()
            view[dim] = -1
            axis = next(a for a in found.axes if (a.tensor, a.dim) == (tensor, dim))
            if axis.role == "in":
                zeroed[tensor] = zeroed.get(tensor, state[tensor]) * keep.reshape(view)
            else:  # whatever the removed channels carry must not matter
                noise[tensor] = noise[tensor] + 10 * (~keep).reshape(view) * torch.randn_like(noise[tensor])
        assert torch.allclose(functional_call(net, {**state, **zeroed}, (x,)), functional_call(net, {**noise, **zeroed}, (x,)), atol=1e-5)


def test_tracing_changes_nothing_and_is_deterministic():
    net = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=True)
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    random = torch.get_rng_state()
    first = channels(net, (torch.randn(2, 3, 64, 64),))
    torch.set_rng_state(random)
    second = channels(net, (torch.randn(2, 3, 64, 64),))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert [g.name for g in first.groups] == [g.name for g in second.groups]
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(first.axes, second.axes, strict=True))
    assert any(g.name.startswith("aux1") for g in first.groups), "heads that run only in train mode are seen"


def test_modules_that_never_run_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 6)

        def forward(self, x):
            return nn.functional.linear(self.a(x), self.b.weight)

    assert set(channels(Net(), (torch.zeros(1, 4),)).unvisited) == {"spare"}
    assert channels(nn.Linear(4, 2), (torch.zeros(1, 4),)).unvisited == {}


def test_a_forward_pass_that_fails_is_one_line():
    with pytest.raises(TraceError) as e:
        trace(nn.Linear(4, 2), (torch.zeros(1, 5),))
    assert "(1, 5)" in str(e.value)
    assert "\n" not in str(e.value)


def test_tracing_mobilenet_costs_a_few_forward_passes():
    """Counted in operations, not seconds: each of the network's operations is dispatched once."""
    net, x = mobilenet(), torch.zeros(1, 3, 64, 64)
    traced = trace(net, (x,))
    calls = []
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for m in net.modules() if not list(m.children())]
    trace(net, (x,))
    for h in handles:
        h.remove()
    assert len(calls) == sum(1 for m in net.modules() if not list(m.children()))
    assert len(traced.channels.groups) == 25


def test_operands_that_a_rule_does_not_know_freeze_what_reaches_it(monkeypatch):
    from gossamer.trace import _rules

    def fails(watch, call):
        raise IndexError("list index out of range")

    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    monkeypatch.setitem(_rules._FOUND, torch.ops.aten.tanh.default, ("tanh", fails, False))
    found = channels(net, (torch.zeros(1, 4),))
    assert [g.name for g in found.groups] == ["2"]
    assert "tanh in 1 is not understood" in {g.frozen for g in found.frozen}
