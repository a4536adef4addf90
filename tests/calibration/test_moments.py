"""Patches and moments of layers' inputs against the layers' own outputs and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.calibration import Batches, JointMoments, Moments, following_norms, in_stages, patches, second_moments, shrunk
from gossamer.errors import UsageError
from gossamer.sources.batches import Batch

LAYERS = [
    nn.Linear(6, 4),
    nn.Conv1d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, (3, 5), padding="same", padding_mode="reflect", groups=2),
    nn.Conv3d(2, 3, 2, dilation=(1, 2, 1)),
    nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1, output_padding=2),
    nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=(2, 0), dilation=(2, 1), groups=2, output_padding=1),
    nn.ConvTranspose2d(4, 4, 3, stride=2, padding=3, output_padding=1),
    nn.ConvTranspose3d(2, 3, 3, stride=(1, 2, 1)),
]


def kernel_of(layer):
    """The weight as (groups, outs, K), by the documented order."""
    w = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        return w[None]
    if not layer.transposed:
        return w.reshape(layer.groups, -1, w[0].numel())
    w = w.reshape(layer.groups, -1, *w.shape[1:]).transpose(1, 2).flip(tuple(range(3, w.dim() + 1)))
    return w.reshape(layer.groups, w.shape[1], -1)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_patches_times_the_kernel_are_the_outputs(layer):
    spatial = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
    x = torch.randn(2, 9, 6) if not spatial else torch.randn(2, layer.in_channels, *(8, 9, 7)[:spatial])
    y = layer(x).detach()
    y = y.reshape(-1, y.shape[-1]) if not spatial else y.movedim(1, -1).reshape(-1, y.shape[1])
    got = torch.einsum("pgk,gok->pgo", patches(layer, x), kernel_of(layer)).flatten(1) + layer.bias.detach()
    rows = torch.arange(len(y))
    if len(y) > 2048:
        rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:2048]
    torch.testing.assert_close(got, y[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("far", [0.0, 3000.0])
def test_moments_equal_numpy_and_stages_hold_every_layer(far):
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    batches = [Batch((torch.randn(20, 5) + far,), {}, None) for _ in range(3)]
    layers = {"0": net[0], "2": net[2]}
    found = second_moments(net, layers, batches)
    x = torch.cat([b.args[0] for b in batches])
    for name, inputs in (("0", x), ("2", net[:2](x).detach())):
        assert isinstance(found[name], Moments)
        np.testing.assert_allclose(found[name].mean[0].numpy(), inputs.double().numpy().mean(0), rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(
            found[name].covariance()[0].numpy(), np.cov(inputs.double().numpy().T, bias=True), atol=1e-3 if far else 1e-5
        )
    assert in_stages(layers) == [["0", "2"]]
    assert in_stages({str(i): nn.Conv2d(400, 2, 3) for i in range(20)}) == [[str(i) for i in range(a, min(a + 10, 20))] for a in (0, 10)]
    with pytest.raises(UsageError, match="the data is empty"):
        second_moments(net, layers, [])


def test_a_norm_that_takes_anything_else_does_not_follow():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(3))
            self.alone, self.shared = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.shared(self.b(self.alone(self.a(x)))) + self.shared(self.c(x))

    net = Net()
    assert following_norms(net, ["a", "b", "c"], [Batch((torch.randn(2, 3, 4, 4),), {}, None)]) == {"a": net.alone}


def test_trying_the_layout_is_not_seen_by_hooks_and_an_abandoned_sweep_starts_again():
    net = nn.Conv2d(2, 3, 1)
    source = [torch.randn(4, 2, 5, 5) for _ in range(3)]
    batches = Batches(source, (source[0],), net)
    assert second_moments(net, {"": net}, batches)[""].n == 3 * 4 * 25
    again = Batches(source, (source[0],), net)
    next(iter(again))
    assert len(list(again)) == 3


def test_inputs_that_never_vary_have_no_covariance_and_zero_is_counted_from():
    x = torch.randn(200, 2, 3)
    x[:, 0, 1] = 1234.5 * (1 + 1e-7 * torch.randn(200))
    found = Moments.of(x[:120]) + Moments.of(x[120:])
    assert not bool(found.covariance()[0, 1].any())
    np.testing.assert_allclose(found.about_zero()[1].numpy(), (x[:, 1].double().T @ x[:, 1].double() / 200).numpy(), atol=1e-5)
    assert bool(torch.linalg.eigvalsh(shrunk(found)).gt(0).all())


@pytest.mark.parametrize("far", [0.0, 3000.0])
def test_joint_moments_of_unequal_parts_equal_numpy(far):
    x, y = torch.randn(2, 4, 300) + far, torch.randn(2, 3, 300) - far
    y[:, :, 7:] += x[:, :3, 7:] - far
    parts = [JointMoments.of(a, b) for a, b in zip(x.split([7, 200, 93], 2), y.split([7, 200, 93], 2), strict=True)]
    whole = (parts[0] + parts[1]) + parts[2]
    assert whole.inputs.n == 300 and whole.products.dtype == torch.float64
    for g in range(2):
        want = np.cov(torch.cat([x, y], 1)[g].double().numpy(), bias=True)
        for found, part in zip(whole.covariances(), (want[:4, :4], want[4:, :4]), strict=True):
            assert found.dtype == torch.float32
            np.testing.assert_allclose(found[g].numpy(), part, rtol=1e-4 if far else 1e-5, atol=1e-3 if far else 1e-5)
        np.testing.assert_allclose(whole.mean[g].numpy(), y[g].double().mean(1).numpy(), rtol=1e-6, atol=1e-5)
