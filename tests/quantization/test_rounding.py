"""Steps, ranges, rounding and bias means against NumPy, SciPy and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import norm

from gossamer.errors import UsageError
from gossamer.quantization import affine_steps, minmax_steps, mse_steps
from gossamer.quantization.adaround import adaround
from gossamer.quantization.bias import clipped_normal_mean
from gossamer.quantization.moments import Geometry
from gossamer.quantization.observers import OBSERVERS, Histogram
from gossamer.quantization.ops import limits
from gossamer.quantization.rounding import damped, descend, fitted_steps, gptq, output_error
from gossamer.quantization.steps import step_grid
from gossamer.quantization.targets import watch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_affine_steps_are_near_the_best_of_a_fine_brute_force(bits):
    w = (torch.rand(3, 100, generator=generator(bits)) ** 2 + torch.tensor([[0.0], [-0.3], [-2.0]])).numpy()
    step, zero = (t.numpy() for t in affine_steps(torch.from_numpy(w), bits))
    levels = 2**bits - 1

    def error(row, s, z):
        return float((((np.clip(np.rint(row / s) + z, 0, levels) - z) * s - row) ** 2).sum())

    for c, row in enumerate(w):
        found = error(row, step[c], zero[c])
        assert 0 <= zero[c] <= levels
        low, high = min(row.min(), 0), max(row.max(), 0)
        grid = np.linspace(0.3, 1.0, 60)
        best = min(error(row, s, np.rint(-a * low / s)) for a in grid for b in grid if (s := (b * high - a * low) / levels) > 0)
        assert found <= best * 1.15
        s = (high - low) / levels
        assert found <= error(row, s, np.rint(-low / s)) * 1.05


def test_weighted_steps_minimise_the_weighted_error():
    w, m = torch.randn(4, 50, generator=generator(1)), torch.rand(50, generator=generator(2)) ** 4
    found = mse_steps(w, 3, 0, importance=m)
    for c in range(4):
        row, weights = w[c].double().numpy(), m.double().numpy()

        def error(s, row=row, weights=weights):
            return float((weights * (np.clip(np.rint(row / s), -4, 3) * s - row) ** 2).sum())

        best = min(error(np.abs(row).max() / 3 * f) for f in step_grid(3, 200).double().numpy())
        assert error(float(found[c])) <= best * (1 + 1e-4)
    assert not torch.equal(found, mse_steps(w, 3, 0))


def test_steps_of_groups_are_those_of_the_groups_alone():
    w = torch.randn(3, 2, 8, generator=generator())
    for search in (minmax_steps, mse_steps):
        found = search(w, 4, 0, group=4)
        assert found.shape == (3, 4)
        alone = torch.stack([search(part, 4, 0) for part in w.flatten(1).split(4, 1)], 1)
        assert torch.equal(found, alone)
    assert mse_steps(w, 4, None, group=8).shape == (6,)
    with pytest.raises(UsageError, match="group=5"):
        mse_steps(w, 4, 0, group=5)


def test_observers_are_what_numpy_computes():
    h, batches = Histogram(), [torch.randn(20000, generator=generator(i)) ** 3 for i in range(4)]
    for b in batches:
        h.update(b)
    low = high = None
    for b in batches:
        lo, hi = min(float(b.min()), 0), max(float(b.max()), 0)
        low, high = (lo, hi) if low is None else (0.9 * low + 0.1 * lo, 0.9 * high + 0.1 * hi)
    assert h.range("moving_average") == pytest.approx((low, high))
    assert h.range("minmax") == (min(float(b.min()) for b in batches), max(float(b.max()) for b in batches))
    ranges = {o: h.range(o) for o in OBSERVERS}
    assert ranges.pop("output") == ranges["mse"]  # where it is not known what the outputs depend on
    assert len(set(ranges.values())) == len(OBSERVERS) - 1
    assert ranges["entropy"][1] < 0.7 * ranges["minmax"][1]


def test_the_entropy_range_has_the_least_divergence_among_a_grid():
    h = Histogram()
    x = torch.randn(2_000_000, generator=generator()).abs() ** 2
    h.update(x)
    centres, counts = h.centres().numpy(), h.counts.numpy()
    used = counts > 0
    centres, counts = centres[used], counts[used]

    def divergence(high):
        step = high / 255
        inside = centres <= high + step / 2
        p = counts[inside].copy()
        p[-1] += counts[~inside].sum()
        codes = np.clip(np.rint(centres[inside] / step), 0, 255).astype(int)
        mass, bins = np.bincount(codes, counts[inside], 256), np.bincount(codes, minlength=256)
        q = (mass / np.maximum(bins, 1))[codes]
        p, q = p / p.sum(), q / q.sum()
        return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())

    found = h.range("entropy")[1]
    assert divergence(found) <= min(divergence(f * h.high) for f in np.linspace(0.25, 1.0, 76)) + 1e-9


@pytest.mark.parametrize(("low", "high"), [(None, None), (0.0, None), (0.0, 6.0), (-1.0, 1.0)])
def test_means_of_clipped_normals_are_numerical_integrals(low, high):
    x = np.linspace(-40, 40, 400001)
    for mean, deviation in ((0.3, 1.0), (-2.0, 0.5), (7.0, 3.0)):
        clipped = np.clip(x, -np.inf if low is None else low, np.inf if high is None else high)
        want = float(np.trapezoid(clipped * norm.pdf(x, mean, deviation), x))
        assert float(clipped_normal_mean(torch.tensor([mean]), torch.tensor([deviation]), low, high)) == pytest.approx(want, abs=1e-4)


def layer(rows: int = 6, inputs: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed)
    x = (torch.randn(500, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g)).relu()
    return torch.randn(1, rows, inputs, generator=g), damped(torch.cov(x.T)[None])


def test_gptq_is_the_textbook_s_row_by_row():
    w, h = layer()
    s = mse_steps(w[0], 4)[None]
    order = h[0].diagonal().argsort(descending=True).numpy()
    hessian = h[0].double().numpy()[np.ix_(order, order)]
    want = np.zeros((6, 24))
    for r in range(6):
        row, step = w[0, r].double().numpy()[order].copy(), float(s[0, r])
        left = list(range(24))
        for k in range(24):  # optimal brain quantisation: the inverse over what is left, computed afresh each time
            inverse = np.linalg.inv(hessian[np.ix_(left, left)])
            code = np.clip(np.rint(row[k] / step), -8, 7)
            row[left] -= (row[k] - code * step) / inverse[0, 0] * inverse[0]
            want[r, order[k]] = code
            left.pop(0)
    assert float((gptq(w, h, s, 4)[0].numpy() == want).mean()) > 0.97  # a tie in float32 may fall the other way


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_rounding_beats_nearest_and_descent_never_hurts(bits):
    w, h = layer(seed=bits)
    low, high = limits(bits, True)
    s = mse_steps(w[0], bits)[None]
    nearest = (w / s[..., None]).round().clamp(low, high)
    base = output_error(w, nearest, h, s).sum()
    for fit in (gptq, adaround):
        q = fit(w, h, s, bits)
        assert torch.equal(q, q.round())
        assert low <= q.min() and q.max() <= high
        assert output_error(w, q, h, s).sum() < 0.95 * base
        better = descend(w, q, h, s, bits)
        assert bool((output_error(w, better, h, s) <= output_error(w, q, h, s) * (1 + 1e-4) + 1e-9).all())
        refit = fitted_steps(w, better, h, s)
        assert bool((output_error(w, better, h, refit) <= output_error(w, better, h, s) * (1 + 1e-4) + 1e-9).all())


def test_rounding_comes_close_to_the_optimum_that_brute_force_finds():
    w, h = layer(rows=8, inputs=6, seed=3)
    s = mse_steps(w[0], 3)[None]
    base = (w / s[..., None]).floor()
    choices = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0, 2.0), repeat=6)))
    optimum = torch.stack(
        [
            output_error(w[:, r : r + 1], (base[:, r : r + 1] + choices[:, None]).clamp(-4, 3).transpose(0, 1), h, s[:, r : r + 1]).min()
            for r in range(8)
        ]
    )
    for fit in (gptq, adaround):
        found = output_error(w, descend(w, fit(w, h, s, 3), h, s, 3), h, s)[0]
        assert bool((found >= optimum * (1 - 1e-4)).all())
        assert float(found.sum()) <= 1.5 * float(optimum.sum())


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "groups"), [((4, 6, 9, 8), 3, 2, 1, 3), ((4, 6, 9, 8), 1, 2, 0, 1), ((4, 6, 9, 8), 3, 1, 1, 6)]
)
def test_covariances_predict_the_change_of_a_convolution(shape, kernel, stride, padding, groups):
    g = generator()
    x = torch.randn(shape, generator=g)
    layer = torch.nn.Conv2d(6, 12, kernel, stride, padding, groups=groups, bias=False)
    geometry = Geometry(groups, 12 // groups, 6 // groups * kernel**2, (kernel, kernel), (stride, stride), (padding, padding), (1, 1))
    with torch.no_grad():
        change = torch.randn(layer.weight.shape, generator=g)
        y = torch.nn.functional.conv2d(x, change, None, stride, padding, 1, groups)
    d = geometry.rows(change)
    seen = watch(geometry, d, x, x)
    predicted = ((d @ sum(seen[1:], seen[0]).covariances()[0]) * d).sum(2).flatten()
    assert torch.allclose(predicted, y.movedim(1, 0).flatten(1).var(1, correction=0), rtol=1e-4)
