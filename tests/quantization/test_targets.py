"""What a layer should compute on inputs that rounding has changed, against least squares by NumPy and against the float network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gossamer as gs
from gossamer.quantization import reconstruction
from gossamer.quantization.moments import Geometry
from gossamer.quantization.targets import target, watch

CONV = Geometry(2, 3, 4 * 9, (3, 3), (2, 1), (1, 1), (1, 1))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_watched_is_what_numpy_computes(weighted):
    w, x, q = drawn(6, 4, 3, 3), drawn(5, 8, 7, 6, seed=1), drawn(5, 8, 7, 6, seed=2)
    weights = drawn(5, 4, 6, seed=4).exp() if weighted else None
    halves = watch(CONV, CONV.rows(w), x, q, weights=weights)

    def check(found: tuple[torch.Tensor, torch.Tensor], index: slice) -> None:
        output = F.conv2d(x, w, None, (2, 1), 1, groups=2) - F.conv2d(q, w, None, (2, 1), 1, groups=2)
        for g in range(2):
            error = output[index, 3 * g : 3 * g + 3].movedim(1, 0).flatten(1).double().numpy()
            columns = F.unfold(q[index, 4 * g : 4 * g + 4], 3, 1, 1, (2, 1)).movedim(1, 0).flatten(1).double().numpy()
            each = None if weights is None else weights[index].flatten().numpy()
            both = np.cov(np.concatenate([error, columns]), bias=True, aweights=each)
            assert np.allclose(found[0][g].numpy(), both[3:, 3:], atol=1e-4)
            assert np.allclose(found[1][g].numpy(), both[:3, 3:], atol=1e-4)

    for half, index in zip(halves, (slice(0, None, 2), slice(1, None, 2)), strict=True):
        check(half.covariances(), index)
    check((halves[0] + halves[1]).covariances(), slice(None))


def test_inputs_far_from_zero_keep_their_covariance():
    """Means of 1,000 deviations: the squares of such values in float32 hold nothing of their variance."""
    shape, w = Geometry(1, 4, 40, (), (), (), ()), drawn(1, 4, 40)
    x, q = (1000 + drawn(24, 40, seed=s) for s in (1, 2))
    whole = sum(watch(shape, w, x, q)[1:], watch(shape, w, x, q)[0])
    assert np.allclose(whole.covariances()[0][0].numpy(), np.cov(q.double().numpy().T, bias=True), atol=1e-3)
    found, _ = target(w, watch(shape, w, x, q))
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_a_few_samples_far_from_zero_are_rounded(rounding):
    torch.manual_seed(0)
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(48, 48, 1), nn.ReLU(), nn.Conv2d(48, 12, 1), nn.Flatten())
    net = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), gate)
    with torch.no_grad():
        net[0].weight.mul_(1e-3)
        net[0].bias.fill_(50.0)
    images = [drawn(6, 3, 8, 8, seed=1)]
    result = gs.quantize(net.eval(), (images[0][:1],), calibration=images, weight_bits=4, rounding=rounding)
    with torch.no_grad():
        wanted, got = net(images[0]), result.model(images[0])
    assert float((got - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


def test_targets_are_ridge_regression_s():
    shape, w = Geometry(1, 4, 6, (), (), (), ()), drawn(1, 4, 6)
    x = drawn(300, 6, seed=1) @ drawn(6, 6, seed=2)
    q = x + 0.3 * drawn(300, 6, seed=3) + 0.2 * x.roll(1, 1)
    found, share = target(w, watch(shape, w, x, q))
    assert share is not None
    ours, arrived = ((v - v.mean(0)).double().numpy() for v in (x, q))
    penalty = np.sqrt(share * arrived.var(0).mean() * 300) * np.eye(6)
    float_w = w[0].double().numpy()
    move, *_ = np.linalg.lstsq(
        np.concatenate([arrived, penalty]), np.concatenate([(ours - arrived) @ float_w.T, np.zeros((6, 4))]), rcond=None
    )
    assert np.allclose(found[0].numpy(), float_w + move.T, atol=0.02 * np.abs(float_w).max())
    error = lambda v: float((torch.from_numpy(ours).float() @ w[0].T - torch.from_numpy(arrived).float() @ v[0].T).square().sum())  # noqa: E731
    assert error(found) < 0.7 * error(w)


def test_errors_that_say_nothing_of_other_samples_move_nothing():
    shape, w, q = Geometry(1, 4, 30, (), (), (), ()), drawn(1, 4, 30), drawn(24, 30, seed=1)
    found, share = target(w, watch(shape, w, q + drawn(24, 30, seed=2), q))
    assert share is None
    assert torch.equal(found, w)
    assert target(w, watch(shape, w, q[:1], q[:1]))[1] is None


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_zeros_of_a_mask_stay_zero_and_others_make_up_for_them(rounding):
    net, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 6)).eval(), drawn(64, 8)
    masked = gs.sparsify(net, sparsity=0.5, example_inputs=(x[:1],))
    result = gs.quantize(masked, (x[:1],), calibration=[x], weight_bits=3, rounding=rounding, target="vnni")
    for name, tensor in masked.model.state_dict().items():
        if name.endswith("weight"):
            codes = result.model.state_dict()[name]
            assert not codes[tensor == 0].any()
            assert codes.any()


def test_later_layers_make_up_for_earlier_ones(monkeypatch):
    def noise() -> float:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 24, 1), nn.ReLU(), nn.Conv2d(24, 8, 1)).eval()
        x, other = drawn(48, 3, 9, 9), drawn(48, 3, 9, 9, seed=5)
        bits = {"0": 2, "*": 4}
        result = gs.quantize(net, (x[:1],), calibration=[x], weight_bits=bits, rounding="gptq", equalize=False, target="vnni")
        with torch.no_grad():
            return float((result.model(other) - net(other)).square().sum() / net(other).square().sum())

    fitted = noise()
    monkeypatch.setattr(reconstruction, "target", lambda w, seen: (w, None))
    assert fitted < 0.85 * noise()
