"""Quantisation-aware training against NumPy, against the integer network it becomes, and against an uninterrupted run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import gossamer as gs
from gossamer.errors import GossamerError, RunFolderError, UsageError
from gossamer.exporting import runtime_ops
from gossamer.plan import QuantizeActivation, QuantizeWeight
from gossamer.quantization.training import FoldedNorm, RoundedActivation, RoundedWeight, train_quantized
from gossamer.quantization.training.norms import output_statistics
from gossamer.quantization.training.prepare import as_fitted, finished, trainable
from gossamer.result import Result


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)
    return net.eval()


def batches(n: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    out = []
    for _ in range(n):
        x = torch.randn(8, 3, 8, 8, generator=generator)
        out.append((x, (2 * (x[:, 0].mean((1, 2)) > 0) + (x[:, 1].mean((1, 2)) > 0)).long()))
    return out


def quantised(**options: object) -> Result:
    return gs.quantize(network(), (torch.zeros(1, 3, 8, 8),), calibration=[x for x, _ in batches()], **options)  # type: ignore[arg-type]


def db(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum().clamp(min=1e-30)))


def test_training_starts_at_the_fitted_codes():
    result = quantised(weight_bits=3, rounding="gptq")
    start = as_fitted(result.floating, result.model, result.plan.edits)
    before, after, stored = result.floating.state_dict(), start.state_dict(), result.model.state_dict()
    moved = 0
    for name in (e.tensor for e in result.plan if isinstance(e, QuantizeWeight)):
        step = stored[name + "_step"].view(-1, *[1] * (after[name].dim() - 1))
        centre = stored[name].float() - (128 >> 5 if stored[name].dtype == torch.uint8 else 0)
        assert torch.equal((after[name] / step).round().clamp(-4, 3), centre)
        near = (before[name] / step - centre).abs() < 0.489
        assert torch.allclose(after[name][near], before[name][near])
        moved += int((~near).sum())
    assert moved


def test_activation_gradients_are_lsq_s():
    edit = QuantizeActivation(point="p", bits=4, signed=False, step=0.3, zero_point=5)
    rounding = RoundedActivation(edit)
    x = (torch.randn(6, 7) * 3).requires_grad_()
    g = torch.randn(6, 7)
    y = rounding(x)
    y.backward(g)
    v, s = x.detach().double().numpy() / 0.3, np.float32(0.3)
    assert np.allclose(y.detach().numpy(), (np.clip(np.rint(v) + 5, 0, 15) - 5) * s, atol=1e-6)
    inside = (v > -5) & (v < 10)
    assert np.array_equal(x.grad.numpy(), g.numpy() * inside)
    each = np.where(inside, np.rint(v) - v, np.where(v <= -5, -5, 10))  # equation 3 of the paper
    want = (g.numpy() * each).sum() / np.sqrt(7 * 10) / 0.3
    assert rounding.ratio.grad.item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_weight_gradients_are_lsq_s(axis):
    count = {0: 5, 1: 6, None: 1}[axis]
    steps = tuple(float(s) for s in np.linspace(0.2, 0.6, count))
    rounding = RoundedWeight(QuantizeWeight(tensor="w", bits=3, axis=axis, signed=True, steps=steps, zero_points=(0,) * count))
    w = torch.randn(5, 6, 2).requires_grad_()
    g = torch.randn(5, 6, 2)
    rounding(w).backward(g)
    shape = {0: (5, 1, 1), 1: (1, 6, 1), None: (1, 1, 1)}[axis]
    s = np.array(steps).reshape(shape)
    v = w.detach().double().numpy() / s
    inside = (v > -4) & (v < 3)
    assert np.array_equal(w.grad.numpy(), g.numpy() * inside)
    each = g.numpy() * np.where(inside, np.rint(v) - v, np.where(v <= -4, -4, 3))
    total = each.sum(tuple(d for d in range(3) if d != axis)) if axis is not None else each.sum()
    want = total / np.sqrt(60 / count * 3) / np.array(steps if axis is not None else steps[0])
    assert np.allclose(rounding.ratio.grad.numpy(), want, rtol=1e-4, atol=1e-6)


def test_where_everything_is_clipped_the_step_s_gradient_is_a_finite_difference():
    rounding = RoundedActivation(QuantizeActivation(point="p", bits=2, signed=False, step=0.1, zero_point=0))
    x, g = torch.rand(5, 3) + 1, torch.randn(5, 3)
    (rounding(x) * g).sum().backward()
    with torch.no_grad():
        before = (rounding(x) * g).sum().item()
        rounding.ratio += 1e-3
        slope = ((rounding(x) * g).sum().item() - before) / 1e-3
    assert rounding.ratio.grad.item() == pytest.approx(slope / np.sqrt(3 * 3) / 0.1**2, rel=1e-2)


def test_sgd_moves_a_step_by_the_fraction_that_lsq_moves_it_by():
    x, g = torch.randn(4, 9), torch.randn(4, 9)
    moved = []
    for first in (0.05, 0.2):  # the same step, written with another first value
        rounding = RoundedActivation(QuantizeActivation(point="p", bits=8, signed=True, step=first, zero_point=0))
        rounding.ratio.data.fill_(0.1 / first)
        (rounding(x) * g).sum().backward()
        moved.append(rounding.ratio.grad.item() * first)
    assert moved[0] == pytest.approx(moved[1], rel=1e-3)


def test_a_norm_starts_as_what_was_folded_and_frozen_it_is_what_eval_computes():
    result = quantised()
    graph = result.floating
    network_ = trainable(graph, [], output_statistics(graph, [[batches()[0][0]]]))
    x = batches()[1][0]
    norms = [m for m in network_.modules() if isinstance(m, FoldedNorm)]
    assert not norms, "without a rounded weight nothing is unfolded"
    network_ = trainable(graph, result.plan.edits, output_statistics(graph, [[batches()[0][0]]]))
    norms = [m for m in network_.modules() if isinstance(m, FoldedNorm)]
    assert len(norms) == 2
    with torch.no_grad():
        assert db(network_.eval()(x), result.model(x)) > 35  # bias correction is not in it
        by_batch = network_.train()(x)
        for norm in norms:
            norm.frozen.fill_(True)
        assert torch.equal(network_(x), network_.eval()(x))
        assert not torch.allclose(by_batch, network_(x))


def test_statistics_are_those_of_the_layers_outputs():
    graph = quantised().floating
    x = batches()[0][0]
    mean, var = output_statistics(graph, [[x[:4]], [x[4:]]])["0.weight"]
    weight = graph.get_parameter("0.weight").detach()
    out = nn.functional.conv2d(x.double(), weight.double(), padding=1)
    assert np.allclose(mean.numpy(), out.mean((0, 2, 3)).numpy(), atol=1e-6)
    assert np.allclose(var.numpy(), out.var((0, 2, 3), correction=0).numpy(), rtol=1e-5)


@pytest.mark.parametrize(("bits", "least_db"), [(8, 45), (3, 25)])
def test_training_and_the_integer_network_agree(bits, least_db):
    result = quantised(weight_bits=bits, activation_bits=bits)
    graph = result.floating
    seen = {}
    trained = train_quantized(result, batches(), epochs=3, lr=5e-3, train=lambda m, d, **o: seen.setdefault("fit", gs.fit(m, d, **o)))
    simulated = seen["fit"].model.eval()
    x = batches(6)[5][0]
    with torch.no_grad():
        assert db(simulated(x), trained.model(x)) > least_db  # biases are rounded: to products of both steps
    _, edits = finished(simulated, graph)
    for rounding in (m for m in simulated.modules() if isinstance(m, RoundedWeight)):
        codes = trained.model.state_dict()[rounding.edit.tensor].int() - (0 if rounding.edit.signed else 2 ** (bits - 1))
        w = simulated.get_parameter(rounding.edit.tensor).detach()
        want = (w / rounding.step().view(-1, *[1] * (w.dim() - 1))).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert torch.equal(codes, want.int())
    assert [e.kind for e in edits] == [e.kind for e in trained.plan]
    assert all(a.bits == bits for a in edits)


def test_it_learns_what_calibration_cannot_and_changes_nothing_of_the_caller_s():
    data, start = batches(8), network()
    net = gs.fit(start, data, epochs=25, lr=1e-2, seed=1).model.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, _ = (torch.cat(t) for t in zip(*data, strict=True))
    calibrated = gs.quantize(net, (x[:1],), calibration=[x], weight_bits=2)
    trained = gs.qat(calibrated, data, epochs=20, lr=1e-2, alpha=1.0)
    with torch.no_grad():
        assert db(net(x), trained.model(x)) > db(net(x), calibrated.model(x)) + 3
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert trained.plan.counts() == calibrated.plan.counts()
    assert trained.before == calibrated.before


def test_from_a_float_network_it_is_quantised_first_and_seeded():
    one, two = (gs.qat(network(), batches(), weight_bits=4, activation_bits=6, seed=3) for _ in range(2))
    assert one.plan == two.plan
    assert all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True))
    assert {e.bits for e in one.plan if isinstance(e, QuantizeWeight)} == {4}
    assert {e.bits for e in one.plan if isinstance(e, QuantizeActivation)} == {6}


def test_killed_and_resumed_it_ends_in_the_same_weights(tmp_path):
    options = {"epochs": 3, "lr": 5e-3, "weight_bits": 3}
    whole = gs.qat(network(), batches(), **options)

    def stop(done: int, total: int) -> None:
        if done == 7:  # after the norms froze, inside an epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gs.qat(network(), batches(), **options, checkpoint=tmp_path, checkpoint_every=1, progress=stop)
    again = gs.qat(network(), batches(), **options, checkpoint=tmp_path, resume=True)
    assert again.plan == whole.plan
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True))
    with pytest.raises(RunFolderError, match=r"cannot be resumed|another network"):
        gs.qat(network(), batches(), epochs=3, lr=5e-3, weight_bits=4, checkpoint=tmp_path, resume=True)


def test_saved_loaded_and_exported_it_is_the_same_network(tmp_path):
    trained = gs.qat(network(), batches(), lr=5e-3)
    x = batches(6)[5][0]
    loaded = gs.load(trained.save(tmp_path / "run"), network())
    assert torch.equal(loaded(x), trained.model(x))
    file = gs.export(trained, tmp_path / "net.onnx", calibration=[x])
    assert file.sqnr_db > 35
    assert runtime_ops(file.path)["QLinearConv"] == 2
    first = next(e for e in trained.plan if isinstance(e, QuantizeActivation) and "hardtanh" in e.point)
    assert first.step * 255 <= 6.00001


def test_zeros_of_a_mask_stay_zero():
    sparse = gs.sparsify(network(), sparsity=0.5, example_inputs=(torch.zeros(1, 3, 8, 8),))
    trained = gs.qat(sparse, batches(), lr=5e-3, epochs=2)
    for name, weight in trained.model.state_dict().items():
        if name in ("0.weight", "3.weight", "8.weight"):
            zero = 0 if weight.dtype == torch.int8 else 128
            kept = sparse.model.state_dict()[name] != 0
            assert bool((weight[~kept] == zero).all())
    assert "mask" in trained.plan.counts()


def test_an_objective_of_one_s_own_and_a_hook_are_called():
    called = []
    gs.qat(quantised(), batches(2), objective="cross_entropy", after_step=lambda m: called.append(type(m).__name__), freeze_norms=0)
    assert len(called) == 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gs.qat(network(), batches(), weight_bits=9), "weight_bits=9"),
        (lambda: gs.qat(quantised(), batches(), weight_bits=4), "quantised already"),
        (lambda: gs.qat(quantised().with_(floating=None), batches()), "starts from"),
        (lambda: gs.qat(network(), batches(), freeze_norms=1.5), "freeze_norms=1.5"),
        (lambda: gs.qat(network(), batches(), objective="mse", teacher=network()), "objective takes no teacher"),
        (lambda: gs.qat(network(), iter(batches())), "read only once"),
        (lambda: gs.qat(network(), [x for x, _ in batches()]), "labels"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(UsageError, match=words) as found:
        call()
    assert "\n" not in str(found.value)


def _sum_of_squares(model, batch):
    out = model(**batch.kwargs) if batch.kwargs else model(*batch.args)
    return sum(t.square().mean() for t in pytree.tree_leaves(out))


@pytest.mark.slow
def test_every_network_that_breaks_other_tools_trains(case):
    net, example = case
    try:
        start = gs.quantize(net.eval(), example, calibration=[example])
    except GossamerError as e:
        pytest.skip(str(e))
    trained = gs.qat(start, [example] * 3, objective=_sum_of_squares, lr=1e-3)
    with torch.no_grad():
        outs = [torch.cat([t.flatten() for t in pytree.tree_leaves(m(*example))]) for m in (start.model, trained.model)]
    assert bool(torch.isfinite(outs[1]).all())
    assert trained.plan != start.plan
    assert outs[1].square().mean() < 2 * outs[0].square().mean() + 1e-6
