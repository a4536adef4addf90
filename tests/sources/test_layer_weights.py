"""Which parameters are weights of layers: each kind of layer, and each kind of thing that is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from gossamer.sources.layer_weights import layer_weights, other_parameters


class Custom(nn.Module):
    """A layer of its own with a kernel, a gain, a token and a position table."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.weight_gain = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Parameter(torch.randn(1, 9, 4))
        self.bias = nn.Parameter(torch.zeros(4))


class ScaledNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.Linear(3, 1), ["weight"]),
        (nn.Conv2d(4, 4, 3, groups=4), ["weight"]),
        (nn.ConvTranspose1d(3, 4, 2), ["weight"]),
        (nn.Conv3d(1, 2, 3), ["weight"]),
        (nn.Bilinear(2, 3, 4), ["weight"]),
        (nn.LSTM(3, 8, proj_size=4), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (nn.GRUCell(3, 4), ["weight_ih", "weight_hh"]),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=5), ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]),
        (nn.Embedding(5, 4), []),
        (nn.EmbeddingBag(5, 4), []),
        (nn.LayerNorm([3, 4]), []),
        (nn.PReLU(4), []),
        (ScaledNorm(), []),
        (Custom(), ["weight"]),
        (parametrizations.weight_norm(nn.Conv1d(3, 4, 2)), ["parametrizations.weight.original1"]),
        (parametrizations.spectral_norm(nn.Linear(3, 4)), ["parametrizations.weight.original"]),
        (nn.LazyLinear(4), []),
    ],
    ids=lambda v: type(v).__name__,
)
def test_each_kind_of_layer(layer, names):
    assert list(layer_weights(layer)) == names
    nested = nn.ModuleDict({"part": layer})
    assert list(layer_weights(nested)) == [f"part.{n}" for n in names]
    assert all(p is nested.get_parameter(n) for n, p in layer_weights(nested).items())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_older_weight_norm():
    assert list(layer_weights(nn.utils.weight_norm(nn.Linear(3, 4)))) == ["weight_v"]


def test_subclasses_count():
    class Same(nn.Conv2d):
        pass

    assert list(layer_weights(nn.Sequential(Same(3, 4, 3)))) == ["0.weight"]


def test_what_is_left_out_is_named():
    assert list(other_parameters(nn.Sequential(Custom(), nn.Embedding(3, 2)))) == ["0.position", "1.weight"]


def test_a_tied_weight_is_listed_once_and_a_table_never():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "table": nn.Embedding(6, 4), "out": nn.Linear(4, 6)})
    net["b"].weight, net["out"].weight = net["a"].weight, net["table"].weight
    assert list(layer_weights(net)) == ["a.weight"]
    assert list(other_parameters(net)) == ["table.weight"]


def test_a_captured_graph_has_the_same_weights():
    from gossamer.trace.capture import capture

    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3), nn.LayerNorm(3)).eval()
    assert list(layer_weights(capture(net, (torch.zeros(2, 5, dtype=torch.long),)))) == ["1.weight"]
