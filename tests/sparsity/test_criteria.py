"""Scores and second-order updates against NumPy, scipy and exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gossamer.calibration import patches
from gossamer.errors import UsageError
from gossamer.sources.batches import Batch
from gossamer.sparsity import Pattern, reconstruct, scores
from gossamer.sparsity.reconstruction import DAMPING


def linear_data(n=3):
    g = torch.Generator().manual_seed(0)
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.copy_(torch.randn(2, 3, generator=g))
    return net, [(torch.randn(5, 3, generator=g), torch.randint(2, (5,), generator=g)) for _ in range(n)]


def gradients(net, batches):
    """Softmax regression by hand."""
    w, b = net.weight.detach().double().numpy(), net.bias.detach().double().numpy()
    out = []
    for x, y in batches:
        z = x.double().numpy() @ w.T + b
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(y)), y.numpy()] -= 1
        out.append(p.T @ x.double().numpy() / len(y))
    return w, np.stack(out)


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "snip"])
def test_gradient_criteria_equal_softmax_regression_by_hand(criterion):
    net, batches = linear_data()
    found, notes = scores(net, {"weight": net.weight}, criterion, calibration=batches, example_inputs=(batches[0][0],))
    w, g = gradients(net, batches)
    want = {"taylor": np.abs(g * w).mean(0), "fisher": w**2 * (g**2).mean(0), "snip": np.abs(w * g.mean(0))}[criterion]
    np.testing.assert_allclose(found["weight"].numpy(), want, rtol=1e-4, atol=1e-7)
    assert notes == ()
    assert all(p.grad is None for p in net.parameters())


def test_wanda_of_a_grouped_convolution():
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=2)
    batches = [torch.randn(2, 4, 5, 5, generator=g) for _ in range(2)]
    found, _ = scores(conv, {"weight": conv.weight}, "wanda", calibration=batches, example_inputs=(batches[0],))
    x = torch.cat(batches).double().numpy()
    rms = np.sqrt((x**2).mean((0, 2, 3)))
    w = conv.weight.detach().double().numpy()
    for o, i in itertools.product(range(6), range(2)):
        np.testing.assert_allclose(found["weight"][o, i].numpy(), np.abs(w[o, i]) * rms[(o // 3) * 2 + i], rtol=1e-5)


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.Conv2d(4, 4, (3, 2), dilation=2, groups=4, padding="same"),
    nn.Conv2d(4, 5, 3, padding=2, padding_mode="reflect"),
    nn.Conv1d(4, 6, 5, stride=3, padding=2),
    nn.Conv3d(4, 2, 3, padding=1, groups=2),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_a_convolution_is_linear_in_its_patches(conv):
    x = torch.randn(1, 4, *(9 - i for i in range(len(conv.kernel_size))), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = conv(x)
        x_PGK = patches(conv, x)
        w_GOK = conv.weight.reshape(conv.groups, -1, x_PGK.shape[2])
        got = torch.einsum("pgk,gok->pgo", x_PGK, w_GOK).flatten(1) + conv.bias
    want = y[0].flatten(1).T
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def apply(net, names, data, **options):
    """Reconstruct in place; the masks."""
    masks, values = reconstruct(net, names, data, **options)
    with torch.no_grad():
        for name, value in values.items():
            net.get_parameter(name).copy_(value)
    return masks


def layer_problem(seed: int, outs=2, ins=6, n=200):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(ins, ins, generator=g)
    x = torch.randn(n, ins, generator=g) @ mix
    layer = nn.Linear(ins, outs, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outs, ins, generator=g))
    return layer, x


def error(w, w0, x):
    return float(((w - w0).double() @ x.double().T).square().sum())


def best_row(w0, x, keep):
    """Exhaustive: every support, least squares on it."""
    x, w0 = x.double().numpy(), w0.double().numpy()
    target = x @ w0
    return min(
        np.linalg.lstsq(x[:, list(s)], target, rcond=None)[1].sum() if len(s) else (target**2).sum()
        for s in itertools.combinations(range(len(w0)), keep)
    )


@pytest.mark.parametrize("seed", range(6))
def test_second_order_lies_between_the_best_possible_and_plain_magnitude(seed):
    layer, x = layer_problem(seed)
    w0 = layer.weight.detach().clone()
    net = nn.Sequential(layer)
    masks = apply(net, ["0.weight"], [Batch((x,), {}, None)], sparsity=0.5, scope="row")
    assert masks["0.weight"].sum(1).tolist() == [3, 3]
    assert bool((layer.weight[~masks["0.weight"]] == 0).all())
    mine = error(layer.weight.detach(), w0, x)
    largest = torch.zeros_like(w0).scatter_(1, w0.abs().topk(3, 1).indices, 1.0)
    plain = error(w0 * largest, w0, x)
    best = sum(best_row(w, x, 3) for w in w0)
    assert best * 0.999 <= mine < 0.65 * plain


def test_second_order_weights_that_stay_are_least_squares_on_their_support():
    layer, x = layer_problem(7, outs=3, ins=8, n=400)
    w0 = layer.weight.detach().clone()
    masks = apply(nn.Sequential(layer), ["0.weight"], [Batch((x,), {}, None)], sparsity=0.5)
    assert int(masks["0.weight"].sum()) == 12
    h = x.T.double() @ x.double() / len(x)
    h += DAMPING[0] * h.diagonal().mean() * torch.eye(8)
    root = torch.linalg.cholesky(h).T.numpy()  # h = root^T root: the damped problem as plain least squares
    for row, start, kept in zip(layer.weight.detach(), w0, masks["0.weight"], strict=True):
        if bool(kept.any()):
            want = np.linalg.lstsq(root[:, kept.numpy()], root @ start.double().numpy(), rcond=None)[0]
            np.testing.assert_allclose(row[kept].numpy(), want, rtol=1e-3, atol=1e-3 * float(start.abs().max()))


def test_second_order_in_a_pattern_and_on_depthwise_convolutions():
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 3))
    x = [Batch((torch.randn(4, 8, 7, 7, generator=g),), {}, None)]
    masks = apply(net, ["1.weight"], x, sparsity=None, pattern=Pattern.parse("2:4"))
    assert bool((masks["1.weight"].reshape(4, 2, 4, 3, 3).sum(2) == 2).all())
    masks = apply(net, ["0.weight"], x, sparsity=0.5)
    assert int(masks["0.weight"].sum()) == 36


def test_second_order_helps_on_held_out_inputs():
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, padding=1)
    base = F.conv2d(torch.randn(24, 3, 12, 12, generator=g), torch.randn(6, 3, 3, 3, generator=g), padding=1)
    train, held = base[:16], base[16:]
    w0 = conv.weight.detach().clone()
    with torch.no_grad():
        want = conv(held)
    plain = torch.where(w0.abs() >= w0.abs().flatten().kthvalue(w0.numel() // 2 + 1).values, w0, 0.0)
    apply(nn.Sequential(conv), ["0.weight"], [Batch((train,), {}, None)], sparsity=0.5)
    with torch.no_grad():
        mine = (conv(held) - want).square().sum()
        conv.weight.copy_(plain)
        theirs = (conv(held) - want).square().sum()
    assert mine < 0.5 * theirs


def test_criteria_without_data_say_so():
    net, _ = linear_data()
    for criterion in ("taylor", "wanda"):
        with pytest.raises(UsageError, match=f"{criterion}.* needs calibration data"):
            scores(net, {"weight": net.weight}, criterion, calibration=None, example_inputs=None)
        with pytest.raises(UsageError, match="data is empty"):
            scores(net, {"weight": net.weight}, criterion, calibration=[], example_inputs=None)
