"""Single convolutions decoupled: exact where they must be, the best that there is elsewhere, in every geometry."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gossamer.calibration import second_moments, shrunk
from gossamer.decoupling import FORMS, convolutions, cost, decouple_layer, fit_layer, most_terms, part
from gossamer.errors import PlanError, UsageError
from gossamer.exchange import canonical, dims
from gossamer.profiling import profile
from gossamer.sources.batches import Batch

LAYERS = {
    "plain": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 9, 7)),
    "strided": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), (2, 8, 9, 7)),
    "same": (lambda: nn.Conv2d(8, 12, (3, 5), padding="same", dilation=(2, 1)), (2, 8, 9, 7)),
    "reflect": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), (2, 8, 9, 7)),
    "circular": (lambda: nn.Conv2d(8, 12, 3, padding=(1, 0), padding_mode="circular"), (2, 8, 9, 7)),
    "groups": (lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1), (2, 8, 9, 7)),
    "1-d": (lambda: nn.Conv1d(8, 12, 5, stride=2), (2, 8, 19)),
    "3-d": (lambda: nn.Conv3d(8, 12, (1, 2, 3), padding=(0, 1, 1)), (2, 8, 3, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1), (2, 8, 5, 4)),
    "transposed, groups": (lambda: nn.ConvTranspose2d(8, 12, 4, stride=2, groups=2), (2, 8, 5, 4)),
    "unbatched": (lambda: nn.Conv2d(8, 12, 3), (8, 9, 7)),
}


def moments_of(layer, x):
    return second_moments(layer, {"": layer}, [Batch((x,), {}, None)])[""]


def smooth(*shape):
    """Noise correlated along positions and between channels, with a mean."""
    x = torch.randn(*shape)
    for d in range(2, len(shape)):
        x = x + x.roll(1, d) + x.roll(2, d)
    mix = torch.eye(shape[1]) + 0.6 * torch.randn(shape[1], shape[1])
    return torch.einsum("nc...,cd->nd...", x, mix) + torch.randn(shape[1]).reshape(-1, *(1,) * (len(shape) - 2))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("fitted", [False, True])
def test_all_terms_and_full_width_are_exact(kind, fitted):
    make, shape = LAYERS[kind]
    layer, x = make().double(), torch.randn(*shape).double()
    d = dims(layer)
    moments = moments_of(layer.float(), x.float()) if fitted else None
    layer = layer.double()
    with torch.no_grad():
        for form, sizes in (("depthwise_separable", (most_terms(d),)), ("bottleneck", (d.ins, d.outs))):
            made = decouple_layer(layer, form=form, sizes=sizes, moments=moments)
            torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("fitted", [False, True])
def test_grouped_finds_hidden_groups_of_any_geometry(kind, fitted):
    """A weight that is grouped between two orders drawn at random: nothing is lost."""
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(*shape)
    d = dims(layer)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    into, out = (torch.randperm(n) for n in (d.ins, d.outs))
    block = (into[:, None] % 2 == out % 2 if transposed else out[:, None] % 2 == into % 2).repeat(d.groups, 1)
    with torch.no_grad():
        layer.weight *= block.reshape(*layer.weight.shape[:2], *(1,) * len(d.kernel))
        found = fit_layer(layer, "grouped", (2,), moments=moments_of(layer, x) if fitted else None)
        torch.testing.assert_close(found.module(x), layer(x), rtol=1e-4, atol=1e-5)
    assert found.error < 1e-4
    (conv,) = convolutions(found.module)
    assert conv.groups == 2 * d.groups


def test_the_parts_hold_as_much_as_brute_force_finds():
    draw = np.random.default_rng(0)
    for trial in range(12):
        energy = draw.random((4, 6)) ** 3
        best = 0.0
        for inputs in itertools.combinations(range(6), 3):
            gain = energy[:, inputs].sum(1) - energy[:, [i for i in range(6) if i not in inputs]].sum(1)
            top = np.argsort(-gain)[:2]
            rest = [o for o in range(4) if o not in top]
            best = max(best, energy[np.ix_(top, inputs)].sum() + energy[np.ix_(rest, [i for i in range(6) if i not in inputs])].sum())
        outs, ins = part(energy, 2, seed=trial)
        held = energy[np.ix_(outs[:2], ins[:3])].sum() + energy[np.ix_(outs[2:], ins[3:])].sum()
        assert held >= best * (1 - 1e-9)
        assert sorted(outs) == list(range(4))
        assert sorted(ins) == list(range(6))


@pytest.mark.parametrize(("groups", "n"), [(2, 32), (4, 64), (8, 64), (16, 48)])
def test_hidden_groups_are_found_under_noise(groups, n):
    draw = np.random.default_rng(groups)
    out, into = draw.permutation(n) % groups, draw.permutation(n) % groups
    energy = 0.2 * draw.random((n, n)) + (out[:, None] == into) * draw.random((n, n))
    outs, ins = part(energy, groups)
    for b in range(groups):
        here = slice(b * n // groups, (b + 1) * n // groups)
        assert len({*out[outs[here]], *into[ins[here]]}) == 1


def test_terms_are_the_truncated_svd_of_each_input_channel():
    layer = nn.Conv2d(6, 20, 3, groups=2).double()
    w = canonical(layer).numpy()
    for terms in (1, 2, 5):
        kernels, pointwise = (m.weight.detach() for m in convolutions(decouple_layer(layer, sizes=(terms,))))
        got = torch.einsum("goiT,giTt->goit", pointwise.reshape(2, 10, 3, terms), kernels.reshape(2, 3, terms, 9)).numpy()
        for g, i in itertools.product(range(2), range(3)):
            matrix = w[g, :, i].reshape(10, 9)
            u, s, vt = np.linalg.svd(matrix)
            np.testing.assert_allclose(got[g, :, i], (u[:, :terms] * s[:terms]) @ vt[:terms], atol=1e-8)
            assert np.linalg.norm(matrix - got[g, :, i]) == pytest.approx(np.linalg.norm(s[terms:]), rel=1e-6)  # Eckart and Young


@pytest.mark.parametrize(
    ("form", "sizes"), [("depthwise_separable", (1,)), ("depthwise_separable", (2,)), ("grouped", (2,)), ("bottleneck", (4, 6))]
)
def test_data_lowers_the_error_of_outputs_not_seen(form, sizes):
    layer = nn.Conv2d(12, 16, 3, padding=1)
    x = smooth(24, 12, 10, 10)
    moments = moments_of(layer, x[:16])
    held = x[16:]
    with torch.no_grad():
        want = layer(held)
        plain, fitted = (decouple_layer(layer, form=form, sizes=sizes, moments=m)(held) - want for m in (None, moments))
        spread = (want - want.mean((0, 2, 3), keepdim=True)).square().mean().sqrt()
        means = plain.mean((0, 2, 3), keepdim=True)
        lost = [float(((e).square().mean().sqrt()) / spread) for e in (plain - means, fitted)]
    assert lost[1] < 0.9 * lost[0]
    told = fit_layer(layer, form, sizes, moments=moments).error
    assert told == pytest.approx(lost[1], rel=0.35)
    with torch.no_grad():  # means are made up for
        made = decouple_layer(layer, form=form, sizes=sizes, moments=moments)
        torch.testing.assert_close(made(x[:16]).mean((0, 2, 3)), layer(x[:16]).mean((0, 2, 3)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_that_are_searched_for_never_lose_more_than_neighbours_do(groups):
    for seed in range(4):
        torch.manual_seed(seed)
        layer, x = nn.Conv2d(12, 16, 3, bias=False), smooth(12, 12, 8, 8)
        for moments in (None, moments_of(layer, x)):
            found, natural = (fit_layer(layer, "grouped", (groups,), moments=moments, inputs=o, outputs=o).error for o in (None, ()))
            assert found <= natural * (1 + 1e-9)
        assert found < 0.99 * natural


@pytest.mark.parametrize(("form", "sizes"), [("depthwise_separable", (2,)), ("grouped", (2,)), ("bottleneck", (4, 4))])
def test_no_small_step_of_the_last_weights_does_better(form, sizes):
    """By automatic differentiation of the outputs' error: what least squares gave is stationary."""
    layer = nn.Conv2d(8, 8, 3)
    moments = moments_of(layer, smooth(8, 8, 9, 9))
    made = decouple_layer(layer, form=form, sizes=sizes, moments=moments).double()
    half = torch.linalg.cholesky(shrunk(moments))[0]  # columns: patches whose second moments are C
    patches = half.T.reshape(-1, 8, 3, 3)
    with torch.no_grad():
        for m in convolutions(made):
            if m.bias is not None:
                m.bias.zero_()
        want = F.conv2d(patches, layer.weight.double())
    loss = (made(patches) - want).square().sum()
    at = {"depthwise_separable": 1, "grouped": 0, "bottleneck": 1}[form]
    last = convolutions(made)[at].weight
    (gradient,) = torch.autograd.grad(loss, last)
    assert float(gradient.norm() * last.detach().norm()) < 1e-4 * float(want.square().sum())


def test_fitting_kernels_too_beats_fitting_only_what_follows_them(monkeypatch):
    layer = nn.Conv2d(12, 16, 3)
    moments = moments_of(layer, smooth(16, 12, 10, 10))
    both = fit_layer(layer, "depthwise_separable", (2,), moments=moments).error
    monkeypatch.setattr("gossamer.decoupling.fits.SWEEPS", 0)
    assert both < 0.98 * fit_layer(layer, "depthwise_separable", (2,), moments=moments).error


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_costs_are_those_of_a_forward_pass(kind, form):
    make, shape = LAYERS[kind]
    layer = make()
    sizes = {"depthwise_separable": (2,), "grouped": (2,), "bottleneck": (2, 3)}[form]
    made = decouple_layer(layer, form=form, sizes=sizes, bias=False)
    seen = profile(made, (torch.zeros(*shape),))
    assert (seen.macs, seen.params) == cost(layer, form, sizes, [shape])


def test_mode_dtype_and_gradients_are_those_of_the_layer():
    layer = nn.Conv2d(8, 8, 3, dtype=torch.float64).eval()
    layer.weight.requires_grad_(False)
    for form, sizes in (("depthwise_separable", (1,)), ("grouped", (4,)), ("bottleneck", (2, 2))):
        made = decouple_layer(layer, form=form, sizes=sizes)
        assert not made.training
        assert {p.dtype for p in made.parameters()} == {torch.float64}
        assert not any(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("silent", [False, True])
def test_weights_and_inputs_without_variance_give_finite_results(value, silent):
    layer = nn.Conv2d(4, 8, 3)
    nn.init.constant_(layer.weight, value)
    x = torch.zeros(4, 4, 6, 6) if silent else torch.randn(4, 4, 6, 6)
    x[:, 1] = 0
    for form, sizes in (("depthwise_separable", (1,)), ("grouped", (2,)), ("bottleneck", (1, 1))):
        found = fit_layer(layer, form, sizes, moments=moments_of(layer, x))
        assert all(bool(torch.isfinite(p).all()) for p in found.module.parameters())
        if form != "grouped" or value == 0 or silent:
            with torch.no_grad():
                torch.testing.assert_close(found.module(x), layer(x), atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_one_line():
    layer = nn.Conv2d(6, 9, 3)
    for form, sizes, text in [
        ("grouped", (2,), "2 groups do not divide"),
        ("depthwise_separable", (10,), "from 1 to 9"),
        ("bottleneck", (2,), "takes 2 sizes"),
        ("bottleneck", (2, 10), "from 1 to 6 and 9"),
    ]:
        with pytest.raises(PlanError, match=text) as e:
            decouple_layer(layer, form=form, sizes=sizes)
        assert "\n" not in str(e.value)
    with pytest.raises(PlanError, match="one position"):
        decouple_layer(nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(UsageError, match="NaN or infinite"):
        decouple_layer(layer)
