"""Predicted losses against the second derivative worked out by differences in float64, and against the loss of the changed network itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gossamer.calibration import Change, Divergence, predicted
from gossamer.exchange import canonical, put
from gossamer.sources.batches import Batch


class Net(nn.Module):
    """Layers of every geometry, one of them called twice, in-place activations and a shortcut."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, padding_mode="reflect")
        self.point = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu_(self.norm(self.stem(x)))
        x = x + torch.relu_(self.depthwise(x))
        x = self.point(torch.relu_(self.point(self.grouped(x))))
        return self.head(torch.tanh(self.up(x)).mean((2, 3)))


def batches(n=2, size=20):
    g = torch.Generator().manual_seed(3)
    return [Batch((torch.randn(size, 3, 8, 8, generator=g),), {}, None) for _ in range(n)]


def layers_of(net):
    return {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)}


def random_changes(net, size):
    g = torch.Generator().manual_seed(4)
    out = {}
    for name, layer in layers_of(net).items():
        w = canonical(layer).flatten(2)
        outs = w.shape[0] * w.shape[1]
        kinds = [size * torch.randn(w.shape, generator=g) * w.std() for _ in range(2)]
        out[name] = [(Change(kinds[0], size * torch.randn(outs, generator=g)),), (Change(kinds[1]),)]
    return out


def with_change(net, name, change, times=1.0):
    """A float64 copy of the network with a multiple of a change made."""
    made = copy.deepcopy(net).double()
    layer = dict(made.named_modules())[name]
    w = canonical(layer)
    put(layer, w + times * change.weight.double().reshape(w.shape))
    if change.bias is not None:
        layer.bias = nn.Parameter((0 if layer.bias is None else layer.bias.detach()) + times * change.bias.double())
    return made


def second_order(net, name, change, batch):
    """Half of dz^T (diag(p) - p p^T) dz, summed over a batch's samples, dz by central differences."""
    x = batch.args[0].double()
    step = 1e-5
    with torch.no_grad():
        dz = (with_change(net, name, change, step)(x) - with_change(net, name, change, -step)(x)) / (2 * step)
        p = copy.deepcopy(net).double()(x).softmax(1)
    return float(0.5 * ((p * dz.square()).sum(1) - (p * dz).sum(1).square()).sum())


def test_predictions_are_the_second_derivative():
    torch.manual_seed(0)
    net, data = Net().eval(), batches()
    far, changes = Divergence(net, data), random_changes(net, 0.1)
    found = predicted(net, layers_of(net), changes, far, draws=150)
    for name, own in changes.items():
        wanted = [sum(second_order(net, name, c, b) for b in data) / 40 for (c,) in own]
        assert found[name] == pytest.approx(wanted, rel=0.1), name


def test_predictions_of_small_changes_are_losses_of_the_changed_network():
    torch.manual_seed(0)
    net, data = Net().eval(), batches(4, 32)
    far, changes = Divergence(net, data, samples=128), random_changes(net, 0.05)
    exact = Divergence(copy.deepcopy(net).double(), [Batch((b.args[0].double(),), {}, None) for b in data], samples=128)
    found = predicted(net, layers_of(net), changes, far)
    for name, own in changes.items():
        assert found[name] == pytest.approx([exact(with_change(net, name, c)) for (c,) in own], rel=0.35), name


def test_outputs_that_are_no_logits_and_the_network_stays_as_it_is():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)).train()
    net[0].weight.requires_grad_(False)
    state = copy.deepcopy(net.state_dict())
    far, changes = Divergence(net, batches(2, 30), samples=60), random_changes(net, 0.02)
    found = predicted(net, layers_of(net), changes, far, draws=4)
    for name, own in changes.items():
        assert found[name] == pytest.approx([far(with_change(net, name, c).float()) for (c,) in own], rel=0.3), name
    assert net.training
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(state[n], t) for n, t in net.state_dict().items())
    assert found == predicted(net, layers_of(net), changes, far, draws=4)


def test_forms_take_batches_in_turn():
    torch.manual_seed(0)
    net, data = Net().eval(), batches(3)
    far = Divergence(net, data, samples=60)
    w = canonical(net.point).flatten(2)
    change = Change(0.3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)))
    found = predicted(net, {"point": net.point}, {"point": [(Change(torch.zeros_like(w)), change)]}, far, draws=200)["point"][0]
    assert found == pytest.approx(second_order(net, "point", change, data[1]) / 60, rel=0.15)


def test_rows_that_are_not_samples():
    """A layer over windows of images and one over sequences in front, on one batch that is not taken apart."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):  # (N, T, C)
            y = torch.tanh(self.one(x.reshape(-1, 2, 6))).reshape(x.shape)
            return self.two(y.transpose(0, 1)).sum(0)[:, :4]

    torch.manual_seed(0)
    net = Windows().eval()
    data = [Batch((torch.randn(8, 6, 6),), {}, None) for _ in range(12)]
    far, changes = Divergence(net, data, samples=96), random_changes(net, 0.03)
    found = predicted(net, layers_of(net), changes, far, draws=60)
    for name, own in changes.items():
        assert found[name] == pytest.approx([far(with_change(net, name, c).float()) for (c,) in own], rel=0.3), name


def test_what_no_gradient_reaches_is_left_out():
    class Cut(nn.Module):
        def __init__(self, wholly):
            super().__init__()
            self.one, self.two, self.wholly = nn.Linear(4, 4), nn.Linear(4, 3), wholly

        def forward(self, x):
            if self.wholly:
                with torch.no_grad():
                    return self.two(self.one(x))
            return self.two(self.one(x).round())

    for wholly, told in ((False, ["two"]), (True, [])):
        net = Cut(wholly)
        far = Divergence(net, [Batch((torch.randn(12, 4),), {}, None)])
        assert list(predicted(net, layers_of(net), random_changes(net, 0.1), far)) == told
