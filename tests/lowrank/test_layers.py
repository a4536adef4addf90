"""Single layers: full rank is the identity for every kind of linear layer and convolution; errors against NumPy and brute force."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.calibration import Moments, patches
from gossamer.errors import PlanError, UsageError
from gossamer.exchange import canonical
from gossamer.lowrank import METHODS, dims, factorize_layer, factors_of, find_sites, fit_layer, full_ranks
from gossamer.lowrank.fitting import product
from gossamer.lowrank.structure import takes

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

LAYERS = [
    nn.Linear(6, 9),
    nn.Linear(9, 4, bias=False),
    nn.Conv1d(4, 6, 3, padding=1),
    nn.Conv1d(6, 6, 5, stride=2, padding=2, groups=3, padding_mode="circular", bias=False),
    nn.Conv2d(5, 7, 1),
    nn.Conv2d(5, 7, 1, stride=2, padding=1),
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(6, 4, (3, 5), stride=(2, 1), padding=(1, 3), dilation=(1, 2), bias=False),
    nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(1, 1)),
    nn.Conv2d(4, 8, (2, 4), padding="same", dilation=(3, 1)),
    nn.Conv2d(4, 8, 3, padding="valid", stride=2),
    nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate", stride=2),
    nn.Conv2d(8, 12, 3, groups=4, padding=1),
    nn.Conv2d(6, 6, 3, groups=6, padding=1),
    nn.Conv2d(3, 6, 5, groups=3, stride=2),
    nn.Conv3d(3, 4, 3, padding=1),
    nn.Conv3d(4, 4, (1, 3, 2), stride=(2, 1, 1), groups=2),
    nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(4, 6, 2, 2),
    nn.ConvTranspose2d(6, 4, (3, 4), stride=(2, 1), padding=(1, 3), dilation=(1, 2), groups=2, output_padding=(1, 0)),
    nn.ConvTranspose2d(6, 6, 3, stride=2, groups=6, bias=False),
    nn.ConvTranspose3d(3, 4, (2, 3, 1), stride=2),
]
CASES = [(layer, method) for layer in LAYERS for method in METHODS if takes(method, dims(layer))]
NAMES = [f"{method}-{layer}" for layer, method in CASES]


def inputs(layer, n=2):
    g = torch.Generator().manual_seed(1)
    if isinstance(layer, nn.Linear):
        return torch.randn(n, 5, layer.in_features, generator=g)
    return torch.randn(n, layer.in_channels, *(9, 11, 8)[: len(layer.kernel_size)], generator=g)


def moments_of(layer, n=40):
    x = patches(layer, inputs(layer, n))
    return Moments.of(x)


@pytest.mark.parametrize(("layer", "method"), CASES, ids=NAMES)
def test_full_rank_is_the_identity(layer, method):
    ranks = full_ranks(method, dims(layer))
    x = inputs(layer)
    with torch.no_grad():
        want = layer(x)
        for moments in (None, moments_of(layer)):
            if method == "cp" and dims(layer).groups * ranks[0] > 400:
                continue
            got = factorize_layer(layer, method=method, ranks=ranks, moments=moments)(x)
            assert got.shape == want.shape
            assert float((got - want).abs().max()) <= 1e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize(("layer", "method"), CASES, ids=NAMES)
def test_lower_ranks_compute_what_their_product_says(layer, method):
    """The modules against the original layer with its weight replaced by the product of the factors."""
    ranks = tuple(max(1, r // 2) for r in full_ranks(method, dims(layer)))
    fitted = fit_layer(layer, method, ranks)
    parts = [canonical(m).double() for m in fitted.module]
    assert [tuple(p.shape) for p in parts] == [f.shape for f in factors_of(method, dims(layer), ranks)]
    dense = copy.deepcopy(layer)
    w = product(method, parts).reshape(canonical(layer).shape)
    with torch.no_grad():
        if getattr(layer, "transposed", False):
            w = w.flip(tuple(range(3, w.dim()))).transpose(1, 2)
        dense.weight.copy_(w.reshape(layer.weight.shape))
        x = inputs(layer)
        torch.testing.assert_close(fitted.module(x), dense(x), rtol=1e-4, atol=1e-5)
    if full_ranks(method, dims(layer)) != ranks and min(full_ranks(method, dims(layer))) > 1:
        assert 0 < fitted.error <= 1 + 1e-9


@pytest.mark.parametrize("layer", [nn.Linear(9, 6), nn.Conv2d(4, 6, 3)], ids=str)
def test_svd_equals_numpy(layer):
    matrix = layer.weight.detach().double().flatten(1).numpy()
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    want = (u[:, :3] * s[:3]) @ vt[:3]
    got = product("svd", [canonical(m).double() for m in factorize_layer(layer, method="svd", ranks=(3,))])
    np.testing.assert_allclose(got[0].flatten(1).numpy(), want, atol=1e-6)
    fitted = fit_layer(layer, "svd", (3,))
    assert fitted.error == pytest.approx(np.sqrt((s[3:] ** 2).sum() / (s**2).sum()), rel=1e-5)


def test_spatial_svd_equals_numpy():
    layer = nn.Conv2d(4, 6, (3, 5))
    matrix = layer.weight.detach().double().numpy().transpose(1, 2, 0, 3).reshape(12, 30)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    want = ((u[:, :4] * s[:4]) @ vt[:4]).reshape(4, 3, 6, 5).transpose(2, 0, 1, 3)
    got = product("spatial_svd", [canonical(m).double() for m in factorize_layer(layer, method="spatial_svd", ranks=(4,))])
    np.testing.assert_allclose(got[0].reshape(6, 4, 3, 5).numpy(), want, atol=1e-6)


def test_tucker2_is_no_worse_than_hosvd_and_random_bases():
    layer = nn.Conv2d(6, 8, 3)
    w = layer.weight.detach().double().numpy()

    def error(a, b):
        core = np.einsum("oixy,ia,ob->baxy", w, a, b)
        return np.linalg.norm(w - np.einsum("baxy,ia,ob->oixy", core, a, b)) / np.linalg.norm(w)

    a = np.linalg.svd(w.transpose(1, 0, 2, 3).reshape(6, -1))[0][:, :3]
    b = np.linalg.svd(w.reshape(8, -1))[0][:, :4]
    rng = np.random.default_rng(0)
    random = [error(np.linalg.qr(rng.normal(size=(6, 3)))[0], np.linalg.qr(rng.normal(size=(8, 4)))[0]) for _ in range(50)]
    got = fit_layer(layer, "tucker2", (3, 4)).error
    assert got <= error(a, b) + 1e-9
    assert got < min(random)


@pytest.mark.parametrize("weight", ["zeros", "ones", "rank one"])
@pytest.mark.parametrize("method", METHODS)
def test_singular_weights_and_inputs(weight, method):
    layer = nn.Conv2d(6, 8, 3, padding=1)
    with torch.no_grad():
        if weight == "rank one":
            layer.weight.copy_(torch.einsum("o,i,x,y->oixy", *(torch.randn(n) for n in (8, 6, 3, 3))))
        else:
            layer.weight.fill_(float(weight == "ones"))
    x = inputs(layer)
    silent = Moments(50, torch.zeros(1, 54), torch.zeros(1, 54, 54))
    constant = Moments.of(torch.ones(50, 1, 54))
    for moments in (None, moments_of(layer), silent, constant):
        for rank in (1, 3):
            ranks = (rank, rank) if method == "tucker2" else (rank,)
            fitted = fit_layer(layer, method, ranks, moments=moments)
            assert fitted.error < 0.02
            with torch.no_grad():
                torch.testing.assert_close(fitted.module(x), layer(x), rtol=1e-3, atol=0.05 * float(layer(x).abs().max()) + 1e-5)


DATA_AWARE = [
    (nn.Conv2d(6, 8, 3, padding=1), "svd", (4,)),
    (nn.Conv2d(6, 8, 3, padding=1), "spatial_svd", (5,)),
    (nn.Conv2d(6, 8, 3, padding=1), "tucker2", (3, 4)),
    (nn.Conv2d(6, 8, 3, padding=1), "cp", (9,)),
    (nn.ConvTranspose2d(6, 8, 3, stride=2), "svd", (4,)),
    (nn.ConvTranspose2d(6, 8, 3, stride=2), "spatial_svd", (5,)),
    (nn.Conv2d(8, 12, 3, groups=2), "tucker2", (2, 3)),
    (nn.Linear(12, 10), "svd", (4,)),
]


@pytest.mark.parametrize(("layer", "method", "ranks"), DATA_AWARE, ids=lambda v: str(v))
def test_factors_fitted_to_inputs_lose_less_of_the_outputs(layer, method, ranks):
    """On inputs with strong correlations and means, fitted on some and compared on others."""
    g = torch.Generator().manual_seed(2)
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    mix = torch.randn(channels, channels, generator=g) * torch.logspace(0.5, -1.5, channels)

    def draw(n):
        z = torch.randn(n, 6, 6, channels, generator=g) @ mix.T + 2
        return z.flatten(0, 2) if isinstance(layer, nn.Linear) else z.movedim(-1, 1)

    x = patches(layer, draw(60))
    moments = Moments.of(x)
    with torch.no_grad():
        held_out = draw(20)
        want = layer(held_out)
        plain = factorize_layer(layer, method=method, ranks=ranks)(held_out) - want
        fitted = factorize_layer(layer, method=method, ranks=ranks, moments=moments)(held_out) - want
    unbiased = plain - plain.mean(
        [d for d in range(plain.dim()) if d != (plain.dim() - 1 if isinstance(layer, nn.Linear) else 1)], keepdim=True
    )
    assert float(fitted.square().mean()) < 0.9 * float(unbiased.square().mean())


def test_data_aware_svd_is_the_best_of_its_rank():
    """Against the closed form in NumPy, and against small changes of it."""
    layer = nn.Linear(8, 6)
    x = torch.randn(4000, 8) @ torch.randn(8, 8)
    moments = Moments.of(x[:, None])
    w, c = layer.weight.detach().double().numpy(), np.cov(x.double().numpy().T, bias=True)
    c = 0.8 * c + 0.2 * np.trace(c) / 8 * np.eye(8)
    values, vectors = np.linalg.eigh(c)
    half = (vectors * np.sqrt(values)) @ vectors.T
    u = np.linalg.svd(w @ half)[0][:, :3]
    got = product("svd", [canonical(m).double() for m in factorize_layer(layer, method="svd", ranks=(3,), moments=moments)])
    np.testing.assert_allclose(got[0].flatten(1).numpy(), u @ u.T @ w, atol=1e-4)


def test_the_last_bias_makes_up_for_the_mean():
    layer = nn.Linear(8, 6, bias=False)
    x = torch.randn(500, 8) * 0.1 + 3
    fitted = fit_layer(layer, "svd", (2,), moments=Moments.of(x[:, None]))
    assert fitted.module[-1].bias is not None
    torch.testing.assert_close(fitted.module(x).mean(0), layer(x).mean(0), atol=1e-4, rtol=1e-4)


def test_modules_keep_mode_dtype_and_what_is_trained():
    layer = nn.Conv2d(4, 6, 3).double().eval().requires_grad_(False)
    made = factorize_layer(layer, method="svd", ranks=(3,))
    assert not made.training
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in made.parameters())
    state = torch.random.get_rng_state()
    factorize_layer(layer, method="cp", ranks=(2,))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_methods_and_ranks_that_do_not_fit_are_one_line():
    conv = nn.Conv2d(4, 6, 3)
    for layer, method, ranks, words in [
        (conv, "svd", (7,), r"svd takes ranks from 1 to \(6,\), not \(7,\)"),
        (conv, "tucker2", (3,), r"ranks from 1 to \(4, 6\)"),
        (conv, "svd", (0,), "ranks from 1"),
        (nn.Linear(3, 2), "spatial_svd", (1,), "does not factorise"),
        (nn.Conv1d(3, 2, 3), "spatial_svd", (1,), "does not factorise"),
        (nn.Conv2d(3, 2, 1), "cp", (1,), "does not factorise"),
        (conv, "svdd", (1,), "does not factorise"),
    ]:
        with pytest.raises(PlanError, match=words):
            factorize_layer(layer, method=method, ranks=ranks)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(UsageError, match="NaN or infinite"):
        factorize_layer(conv, method="svd", ranks=(1,))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_costs_equal_the_profile(layer):
    from gossamer import profile

    x = (inputs(layer),)
    layer = layer.eval()
    (site,), _ = find_sites(layer, x)
    whole = profile(layer, x)
    assert (site.macs, site.params) == (whole.macs, whole.params)
    for method in METHODS:
        if takes(method, site.dims):
            ranks = tuple(max(1, r // 2) for r in full_ranks(method, site.dims))
            made = profile(factorize_layer(layer, method=method, ranks=ranks), x)
            assert site.cost(method, ranks) == (made.macs, made.params)
