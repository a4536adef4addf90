"""How much positions count, against the exact derivative, and what rounding gains by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.quantization import positions, reconstruction
from gossamer.quantization.canonical import canonical
from gossamer.quantization.graph import weighted_nodes
from gossamer.quantization.positions import position_weights
from gossamer.trace.capture import capture


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Framed(nn.Module):
    """What the middle of each picture shows is read; its frame hardly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 24, 1), nn.Linear(24, 10)
        frame = torch.full((10, 10), 0.01)
        frame[3:7, 3:7] = 1.0
        self.register_buffer("frame", frame)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x).relu() * self.frame).mean((2, 3)))


def pictures(seed: int) -> torch.Tensor:
    """Other combinations of channels vary in the frame, and further, than in the middle."""
    frame, middle = (torch.einsum("sdhw,cd->schw", drawn(32, 2, 10, 10, seed=seed + s), drawn(8, 2, seed=s)) for s in (100, 200))
    frame[:, :, 3:7, 3:7] = 0.5 * middle[:, :, 3:7, 3:7]
    return frame


def test_positions_count_as_the_exact_derivative_says():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.GELU(), nn.Flatten(2), nn.Linear(9, 4), nn.GELU(), nn.Flatten(), nn.Linear(20, 3)).eval()
    x = drawn(1, 2, 5, 5)
    graph = canonical(capture(net, (x,)))
    conv, linear, _ = weighted_nodes(graph.graph)
    many = x.expand(4000, -1, -1, -1).clone()
    (found,) = position_weights(graph, [conv, linear], [[many]])
    with torch.no_grad():
        h = net[0](x)
        z = net[3](net[2](net[1](h)))
    for node, value, rest, dim in ((conv, h, net[1:], 1), (linear, z, net[4:], -1)):
        exact = torch.autograd.functional.jacobian(rest, value)[0, :, 0].square().sum(0).mean(dim if dim < 0 else dim - 1)
        got = found[node.name].mean(0)
        assert found[node.name].shape == (4000, *exact.shape)
        assert torch.allclose(got / got.mean(), exact / exact.mean(), rtol=0.1, atol=0.02)
    (roots,) = position_weights(graph, [conv, linear], [[many]], activation_bits=4)
    assert all(torch.allclose((roots[n] - 1e-3).square(), found[n] - 1e-3, rtol=1e-3, atol=1e-5) for n in found)


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_codes_are_fitted_where_it_matters(rounding, monkeypatch):
    options = {"weight_bits": {"last": 8, "*": 3}, "equalize": False, "target": "vnni", "rounding": rounding}

    def noise() -> float:
        total = 0.0
        for seed in range(4):
            torch.manual_seed(seed)
            net, other = Framed().eval(), pictures(9)
            result = gs.quantize(net, (other[:1],), calibration=[pictures(1), pictures(2)], **options)
            with torch.no_grad():
                y = net(other)
                total += float((result.model(other) - y).square().sum() / (y - y.mean(0)).square().sum())
        return total

    weighted = noise()
    monkeypatch.setattr(reconstruction, "position_weights", lambda module, layers, pieces, bits: [{} for _ in pieces])
    assert weighted < 0.92 * noise()


def test_without_a_derivative_all_positions_count_alike(monkeypatch):
    def none(*args, **options):
        raise RuntimeError("derivative for aten::x is not implemented")

    torch.manual_seed(0)
    net, x = Framed().eval(), pictures(1)
    graph = canonical(capture(net, (x,)))
    monkeypatch.setattr(positions, "derivatives", none)
    assert position_weights(graph, weighted_nodes(graph.graph), [[x], [x]]) == [{}, {}]
    gs.quantize(net, (x[:1],), calibration=[x], rounding="gptq")
