"""Quantisation against NumPy, and a rebuilt network against the one it was built from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import gossamer as gs
from gossamer.errors import GossamerError, NothingToDo, SelectorError, UsageError
from gossamer.quantization import apply_edits, minmax_steps, mse_steps
from gossamer.quantization.ops import dequantize, quantize_dequantize
from gossamer.quantization.steps import step_grid
from gossamer.quantization.target import resolve


def network() -> nn.Sequential:
    def block(i, o, s=1, g=1, act=nn.ReLU):
        return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, groups=g, bias=False), nn.BatchNorm2d(o), act())

    net = nn.Sequential(
        block(3, 16), block(16, 16, g=16, act=nn.ReLU6), block(16, 24, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)
    )
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
    return net.eval()


def images(n: int = 4) -> list[torch.Tensor]:
    return [torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(n)]


def db(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_step_search_is_as_good_as_a_brute_force_grid(bits):
    w = torch.randn(6, 576, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-2, 1, 6)[:, None]
    found = mse_steps(w, bits, 0).numpy()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def error(row: np.ndarray, step: float) -> float:
        return float(((row - np.clip(np.rint(row / step), low, high) * step) ** 2).mean())

    for c in range(6):
        row = w[c].numpy().astype(np.float64)
        best = min(error(row, np.abs(row).max() / high * f) for f in step_grid(bits, 200).numpy())
        assert error(row, float(found[c])) <= best * (1 + 1e-4)
        fine = min(error(row, np.abs(row).max() / high * f) for f in np.linspace(0.2, 1.2, 4000))
        assert error(row, float(found[c])) <= fine * 1.1
        assert error(row, float(found[c])) <= error(row, float(minmax_steps(w, bits, 0)[c])) * (1 + 1e-6)


def test_dead_channels_get_a_step_that_is_neither_zero_nor_tiny():
    w = torch.randn(4, 10)
    w[1] = 0
    for steps in (mse_steps(w, 8, 0), minmax_steps(w, 8, 0)):
        assert bool(torch.isfinite(steps).all())
        assert float(steps.min()) > 1e-6


def test_the_operators_are_numpy_s():
    x = torch.randn(1000) * 3
    got = quantize_dequantize(x, torch.tensor(0.031), torch.tensor(117, dtype=torch.uint8), 0, 255).numpy()
    step = np.float32(0.031)
    want = (np.clip(np.rint(x.numpy() / step) + 117, 0, 255) - 117) * step
    assert np.array_equal(got, want.astype(np.float32))
    q = torch.randint(0, 255, (3, 4), dtype=torch.uint8)
    steps, zeros = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([128, 128, 128], dtype=torch.uint8)
    assert np.allclose(dequantize(q, steps, zeros, 0).numpy(), (q.numpy().astype(float) - 128) * steps.numpy()[:, None])


def test_the_quantised_network_is_close_and_holds_integers_only():
    net, data = network(), images()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    result = gs.quantize(net, (data[0],), calibration=data)
    with torch.no_grad():
        assert db(net(data[0]), result.model(data[0])) > 20
    state = result.model.state_dict()
    assert all(t.dtype in (torch.int8, torch.uint8, torch.int32) for t in state.values() if t.dim() > 1)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert result.after.macs == result.before.macs
    assert result.after.weight_bytes < 0.4 * result.before.weight_bytes


def test_a_plan_and_a_state_dict_rebuild_it_bit_for_bit():
    net, data = network(), images()
    result = gs.quantize(net, (data[0],), calibration=data)
    rebuilt = apply_edits(network(), result.plan.edits, result.plan.example_inputs())
    rebuilt.load_state_dict(result.model.state_dict())
    assert torch.equal(rebuilt(images(9)[8]), result.model(images(9)[8]))


@pytest.mark.parametrize(("target", "dtype"), [("vnni", torch.int8), ("arm", torch.int8), ("avx2", torch.uint8)])
def test_the_target_decides_how_weights_are_stored_and_not_what_they_are(target, dtype):
    net, data = network(), images()
    result = gs.quantize(net, (data[0],), calibration=data, target=target)
    assert result.model.state_dict()["0.0.weight"].dtype == dtype
    assert any(target in n for n in result.notes)
    signed = gs.quantize(net, (data[0],), calibration=data, target="vnni")
    with torch.no_grad():
        assert torch.allclose(signed.model(data[0]), result.model(data[0]), atol=1e-5)


def test_auto_reads_the_flags(monkeypatch):
    found = resolve("auto")
    assert found.name in ("vnni", "avx2", "arm")
    assert found.here
    assert found.signed == (found.name != "avx2")


def test_fewer_bits_and_every_observer_work():
    net, data = network(), images()
    with torch.no_grad():
        want = net(data[0])
        eight = db(want, gs.quantize(net, (data[0],), calibration=data).model(data[0]))
        four = db(want, gs.quantize(net, (data[0],), calibration=data, weight_bits=4).model(data[0]))
        assert eight > four > 3
        for observer in ("minmax", "percentile"):
            assert db(want, gs.quantize(net, (data[0],), calibration=data, observer=observer).model(data[0])) > 15


def test_ignored_layers_stay_float():
    net, data = network(), images()
    result = gs.quantize(net, (data[0],), calibration=data, ignore=["0.*"])
    assert result.model.state_dict()["0.0.weight"].dtype == torch.float32
    assert result.model.state_dict()["5.weight"].dtype in (torch.int8, torch.uint8)


def test_calibration_is_read_once_and_batch_by_batch():
    read = []

    class Stream:
        def __iter__(self):
            for batch in images(6):
                read.append(1)
                yield batch

    gs.quantize(network(), (images()[0],), calibration=Stream(), bias_correction=False)
    assert len(read) <= 12


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, UsageError, "calibration"),
        ({"calibration": []}, GossamerError, "empty"),
        ({"calibration": images(), "weight_bits": 9}, UsageError, "weight_bits"),
        ({"calibration": images(), "step": "msee"}, UsageError, "'?mse'?"),
        ({"calibration": images(), "target": "avx3"}, UsageError, "avx2"),
        ({"calibration": images(), "ignore": ["nothing*"]}, SelectorError, "nothing"),
        ({"calibration": [torch.full((2, 3, 12, 12), float("nan"))]}, UsageError, "NaN"),
    ],
)
def test_mistakes_are_one_line(options, error, words):
    with pytest.raises(error, match=words) as e:
        gs.quantize(network(), (images()[0],), **options)
    assert "\n" not in str(e.value)


def test_weights_that_are_nan_and_networks_without_layers():
    net = network()
    with torch.no_grad():
        net[5].weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"5\.weight"):
        gs.quantize(net, (images()[0],), calibration=images())
    with pytest.raises(NothingToDo, match="no convolution or linear"):
        gs.quantize(nn.Sequential(nn.ReLU()), (torch.randn(2, 3),), calibration=[torch.randn(2, 3)])


def test_all_of_mobilenet_s_steps_are_counted():
    net = torchvision.models.mobilenet_v2(weights=None)
    weights = [p.detach() for p in net.parameters() if p.dim() > 1]
    steps = [mse_steps(w, 8, 0) for w in weights]
    assert sum(map(len, steps)) == sum(w.shape[0] for w in weights)
