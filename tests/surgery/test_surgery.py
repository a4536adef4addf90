"""Surgery: random halves of every family cut from known networks, proved, run in both modes; and a proof that can fail."""

from __future__ import annotations

import importlib.util
import warnings
from types import ModuleType

import pytest
import torch
import torchvision
from torch import nn

from conftest import SHARED
from gossamer.errors import NothingToDo
from gossamer.plan import apply_structure
from gossamer.surgery import cut, prove
from gossamer.trace import Trace, costs, trace


def halves(traced: Trace, seed: int = 0) -> torch.Tensor:
    """A random half of every family."""
    generator = torch.Generator().manual_seed(seed)
    removed = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    for group in traced.channels.groups:
        n = len(group.classes)
        removed[group.classes[torch.randperm(n, generator=generator)[: n // 2]]] = True
    return removed


def doubled(inputs):
    return tuple(torch.cat([t, t]) for t in inputs)


ZOO = [
    "mobilenet_v2",
    "resnet18",
    "shufflenet_v2_x0_5",
    "densenet121",
    "squeezenet1_1",
    "efficientnet_b0",
    "regnet_x_400mf",
    "googlenet",
    "resnext50_32x4d",
]


@pytest.mark.parametrize("name", ZOO)
def test_half_of_every_family(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torchvision.models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    for m in net.modules():  # untrained norms would hide a mistake in their statistics
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.1)
    inputs = (torch.randn(2, 3, 64, 64),)
    traced = trace(net, inputs)
    made = cut(net, traced, halves(traced))
    assert made.proof.difference is not None
    assert made.proof.holds
    assert costs(made.model, inputs).macs < 0.45 * traced.profile.macs
    made.model.eval()(*doubled(inputs))
    made.model.train()(*doubled(inputs))


def test_the_edits_are_the_cut():
    net = torchvision.models.mobilenet_v2(weights=None).eval()
    inputs = (torch.randn(1, 3, 64, 64),)
    traced = trace(net, inputs)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    made = cut(net, traced, halves(traced))
    again = apply_structure(net, made.edits)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in made.model.state_dict().items())
    assert torch.equal(again(*inputs), made.model(*inputs))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    conv = made.model.features[2].conv[1][0]
    assert conv.groups == conv.in_channels == conv.out_channels == conv.weight.shape[0]


def test_the_proof_fails_where_a_wrong_channel_went():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()
    inputs = (torch.randn(2, 3, 8, 8),)
    traced = trace(net, inputs)
    group = traced.channels.groups[0]
    one, other = torch.zeros(traced.channels.num_classes, dtype=torch.bool), torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    one[group.classes[0]], other[group.classes[1]] = True, True
    made = cut(net, traced, one)
    assert prove(net, made.model, traced, one).holds
    assert not prove(net, made.model, traced, other).holds
    with torch.no_grad():
        made.model[2].bias += 0.1
    assert not prove(net, made.model, traced, one).holds


def test_layer_norm_is_left_out_of_the_proof_with_its_reason():
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    inputs = (torch.randn(3, 4),)
    traced = trace(net, inputs)
    made = cut(net, traced, halves(traced))
    assert made.model[1].normalized_shape == (4,)
    assert made.proof.holds
    assert made.proof.exact == ("2",)
    assert "native_layer_norm" in made.proof.inexact["0"]


class Checked(nn.Module):
    """Code that refuses any other width than the one it was written for."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1), nn.Linear(24, 5)

    def forward(self, x):
        x = self.b(self.a(x).relu())
        if x.shape[1] != 24:
            raise ValueError("24 channels, please")
        return self.head(x.mean((2, 3)))


def test_channels_that_the_code_insists_on_are_left_in_and_the_rest_is_cut():
    net, inputs = Checked().eval(), (torch.randn(2, 3, 8, 8),)
    traced = trace(net, inputs)
    made = cut(net, traced, halves(traced))
    assert made.model.a.out_channels == 8
    assert made.model.b.out_channels == 24
    assert "24 channels, please" in made.notes[0]
    assert bool(made.frozen.any())
    assert made.proof.holds


def test_nothing_that_can_go_is_an_error_that_says_why():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.a(x)
            assert x.shape[1] == 6, "6 wanted"
            return self.b(x)

    net, inputs = Net().eval(), (torch.randn(2, 4),)
    traced = trace(net, inputs)
    with pytest.raises(NothingToDo, match="6 wanted"):
        cut(net, traced, halves(traced))


def networks() -> ModuleType | None:
    """Small inputs that break other tools, where they lie beside the checkout."""
    path = SHARED / "cases" / "networks.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("networks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = networks()


@pytest.mark.skipif(CASES is None, reason="the cases are not beside this checkout")
@pytest.mark.parametrize("make", [] if CASES is None else CASES.ALL, ids=lambda f: f.__name__)
def test_cases_are_pruned_with_a_proof(make):
    net, inputs = make()
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a case branches on a tensor's value, which torch warns of
        traced = trace(net, inputs)
        made = cut(net, traced, halves(traced))
        assert bool(made.removed.any())
        assert made.proof.holds or (made.proof.difference is None and made.proof.inexact)
        made.model(*doubled(inputs))
        made.model.train()(*doubled(inputs))
    assert costs(made.model, inputs).macs < traced.profile.macs
