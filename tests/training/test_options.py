"""Accumulation, averages, precision, rates by layer, metrics, early stopping, trackers, optimisers: each against arithmetic by hand."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gossamer.errors import SourceError, UsageError
from gossamer.training import fit, make_optimizer, precision, state_bytes
from gossamer.training.optimizers import blocks_of

SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0}


def data(sizes=(8, 8, 8, 4)) -> list:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g)) for n in sizes]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def same(a: nn.Module, b: nn.Module, **tolerance) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, **({"rtol": 0, "atol": 0} | tolerance))


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_accumulated_batches_are_one_large_batch_ragged_ends_included(accumulate):
    small = data()
    groups = [small[i : i + accumulate] for i in range(0, 4, accumulate)]
    large = [(torch.cat([x for x, _ in g]), torch.cat([y for _, y in g])) for g in groups]
    seen: list[tuple[int, int]] = []
    many = fit(net(), small, accumulate=accumulate, epochs=2, lr=1e-2, progress=lambda *s: seen.append(s))
    one = fit(net(), large, epochs=2, lr=1e-2)
    same(many.model, one.model, rtol=1e-4, atol=1e-6)
    assert many.steps == one.steps == 2 * len(groups)
    assert seen[-1] == (many.steps, many.steps)
    assert many.history[0]["loss"] > 0


def test_after_step_is_called_after_each_update_and_masks_hold_also_when_accumulating():
    calls: list[float] = []

    def hold(model):
        assert not torch.is_grad_enabled()
        calls.append(model[0].weight[0].abs().sum().item())
        model[0].weight[0] = 0

    trained = fit(net(), data(), accumulate=2, epochs=3, lr=1e-2, after_step=hold)
    assert len(calls) == 6
    assert all(c > 0 for c in calls)
    assert not trained.model[0].weight[0].any()


def test_the_average_is_the_recursion_and_comes_back():
    seen: list[torch.Tensor] = []
    trained = fit(net(), data(), ema=0.7, epochs=2, lr=1e-2, after_step=lambda m: seen.append(m[0].weight.detach().clone()))
    average = seen[0]
    for w in seen[1:]:
        average = 0.7 * average + 0.3 * w
    torch.testing.assert_close(trained.model[0].weight.detach(), average)
    assert set(trained.model.state_dict()) == set(net().state_dict())


def test_rates_fall_towards_the_input():
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"layer_0": nn.Linear(2, 2)}), nn.Linear(2, 2))
    model.forward = lambda x: model[2](model[1]["layer_0"](model[0](x)))  # type: ignore[method-assign]
    assert list(blocks_of(model)) == ["0", "1", "2"]
    scales = {id(p): g["scale"] for g in make_optimizer(model, layer_decay=0.5).param_groups for p in g["params"]}
    assert [scales[id(model[i].weight)] for i in (0, 2)] == [0.25, 1.0]
    x, y = data((4,))[0]
    for decay in (1.0, 0.1):
        moved = fit(net(), [(x, y)], lr=0.5, layer_decay=decay, **SGD).model
        grads = torch.autograd.grad(F.cross_entropy((m := net())(x), y), list(m.parameters()))
        torch.testing.assert_close(m[0].weight - moved[0].weight, 0.5 * decay * grads[0])
        torch.testing.assert_close(m[2].weight - moved[2].weight, 0.5 * grads[2])


@pytest.mark.parametrize(("name", "per_parameter"), [("sgd", 4.0), ("adamw", 8.0), ("adafactor", None), ("adamw8bit", None)])
def test_every_optimizer_learns_and_its_state_is_counted(name, per_parameter):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 512), nn.Tanh(), nn.Linear(512, 64), nn.Tanh(), nn.Linear(64, 3))
    result = fit(model, data() * 4, epochs=4, lr={"sgd": 0.1, "adafactor": 0.01}.get(name, 1e-3), optimizer=name)
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]
    count = sum(p.numel() for p in model.parameters())
    if per_parameter is not None:
        assert result.optimizer_state_bytes == pytest.approx(per_parameter * count, rel=0.01)
    else:
        assert 0 < result.optimizer_state_bytes < 4 * count
    assert "optimiser state" in str(result)


def test_8_bit_adamw_resumes_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(6, 1024), nn.Tanh(), nn.Linear(1024, 3))

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    whole = fit(model, data(), epochs=2, optimizer="adamw8bit")
    with pytest.raises(KeyboardInterrupt):
        fit(model, data(), epochs=2, optimizer="adamw8bit", checkpoint=tmp_path, progress=stop)
    again = fit(model, data(), epochs=2, optimizer="adamw8bit", checkpoint=tmp_path, resume=True)
    same(whole.model, again.model)


def test_a_missing_package_is_named(monkeypatch):
    for module in ("bitsandbytes.optim", "mlflow", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    for options, extra in [
        ({"optimizer": "adamw8bit"}, "bitsandbytes"),
        ({"mlflow": "x"}, "mlflow"),
        ({"tensorboard": "x"}, "tensorboard"),
    ]:
        with pytest.raises(UsageError, match=rf"gossamer\[{extra}\]"):
            fit(net(), data(), **options)


@pytest.mark.filterwarnings("ignore:this CPU has no")
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_half_precision_trains_close_to_float(kind):
    seen: list[torch.dtype] = []

    def objective(out, target):
        seen.append(out.dtype)
        return F.cross_entropy(out.float(), target)

    half = fit(net(), data(), epochs=3, lr=1e-2, objective=objective, precision=kind, val=data())
    full = fit(net(), data(), epochs=3, lr=1e-2, val=data())
    assert set(seen) == {precision.DTYPES[kind]}
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert half.history[-1]["loss"] == pytest.approx(full.history[-1]["loss"], rel=0.03)


def test_a_cpu_without_bf16_is_warned_of(monkeypatch):
    monkeypatch.setattr(precision, "native_bf16", lambda: False)
    with pytest.warns(UserWarning, match=r"no bf16 instructions.*3\.4 times"):
        fit(net(), data(), precision="bf16")
    monkeypatch.setattr(precision, "native_bf16", lambda: True)
    fit(net(), data(), precision="bf16")


def test_metrics_are_means_over_the_samples():
    model = nn.Linear(6, 3)
    held_out = data((8, 3))
    own = lambda out, target: (out.argmax(1) == 0).float().mean()  # noqa: E731
    record = fit(model, data(), lr=1e-12, val=held_out, metrics={"zeros": own}).history[0]
    x, y = torch.cat([b[0] for b in held_out]), torch.cat([b[1] for b in held_out])
    z = model(x)
    assert record["val_zeros"] == pytest.approx((z.argmax(1) == 0).float().mean().item())
    assert record["val_accuracy"] == pytest.approx((z.argmax(1) == y).float().mean().item())
    named = fit(model, data(), val=held_out, metrics=["top5", "accuracy"]).history[0]
    assert named["val_top5"] == 1.0
    regression = [(torch.randn(4, 6), torch.randn(4, 3))]
    record = fit(model, regression, lr=1e-12, objective="mse", val=regression, metrics=["mse", "mae"]).history[0]
    assert record["val_mse"] == pytest.approx(record["val_loss"])
    assert record["val_mae"] == pytest.approx((model(regression[0][0]) - regression[0][1]).abs().mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["mse", "l1", "huber", "bce"])
def test_objectives_by_name(name):
    x, y = torch.randn(4, 6), torch.rand(4, 3)
    want = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss, "bce": F.binary_cross_entropy_with_logits}[name]
    result = fit(net(), [(x, y)], objective=name)
    assert result.history[0]["loss"] == pytest.approx(want(net()(x), y).item(), rel=1e-5)
    assert result.history[0]["objective"] == name
    with pytest.raises(SourceError, match="same shape"):
        fit(net(), [(x, y[:, :2])], objective=name)


def test_early_stopping_returns_the_best_weights_and_counts_what_was_done():
    held_out = data((30,))
    torch.manual_seed(5)
    noise = [(torch.randn(16, 6), torch.randint(3, (16,)))]  # nothing to learn: validation gets worse
    wide = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3))
    result = fit(wide, noise, epochs=60, lr=3e-2, val=held_out, patience=4)
    losses = [r["val_loss"] for r in result.history]
    best = losses.index(min(losses))
    assert result.best_epoch == best + 1
    assert len(losses) == best + 5 < 60
    assert result.steps == len(losses)
    again = fit(result.model, noise, lr=1e-12, val=held_out)
    assert again.history[0]["val_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_tensorboard_gets_every_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fit(net(), data(), epochs=3, val=data(), tensorboard=tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in events.Scalars("val_loss")] == pytest.approx([r["val_loss"] for r in result.history])


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="the real one is tested instead")
def test_mlflow_gets_settings_and_every_epoch(monkeypatch):
    """Against a recorder with MLflow's own function names."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    seen: dict[str, list] = {"params": [], "metrics": [], "experiment": []}
    monkeypatch.setitem(
        sys.modules,
        "mlflow",
        SimpleNamespace(
            set_experiment=seen["experiment"].append,
            start_run=nullcontext,
            log_params=seen["params"].append,
            log_metrics=lambda numbers, step: seen["metrics"].append((step, numbers)),
        ),
    )
    result = fit(net(), data(), epochs=2, mlflow="mine")
    assert seen["experiment"] == ["mine"]
    assert seen["params"][0]["lr"] == "0.001"
    assert [(s, m["loss"]) for s, m in seen["metrics"]] == [(i + 1, r["loss"]) for i, r in enumerate(result.history)]


def test_workers_give_the_order_and_the_weights_of_none():
    x, y = torch.randn(32, 6), torch.randint(3, (32,))

    def loader(workers: int) -> DataLoader:
        return DataLoader(
            TensorDataset(x, y), batch_size=8, shuffle=True, num_workers=workers, multiprocessing_context="fork" if workers else None
        )

    same(fit(net(), loader(0), epochs=2).model, fit(net(), loader(2), epochs=2).model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate >= 1"),
        ({"ema": 1.0}, "ema in"),
        ({"precision": "fp8"}, "fp32, bf16, fp16"),
        ({"patience": 2}, "give val"),
        ({"val": "v", "patience": 2, "monitor": "val_f1"}, "not measured, these are: val_loss, val_accuracy"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"metrics": ["accurracy"]}, "did you mean 'accuracy'"),
        ({"metrics": {"mine": 3}}, "not callable"),
        ({"objective": "mean_squares"}, "unknown objective"),
        ({"optimizer": "adamw8bits"}, "did you mean 'adamw8bit'"),
        ({"optimizer_in_backward": True, "clip": 1.0}, "leave out clip"),
    ],
)
def test_bad_options(options, message):
    if "val" in options:
        options = options | {"val": data()}
    with pytest.raises(UsageError, match=message):
        fit(net(), data(), **options)


def test_the_state_of_an_optimizer_and_the_record_are_json(tmp_path):
    log = tmp_path / "log.jsonl"
    fit(net(), data(), val=data(), metrics=["top5"], log=log)
    assert "val_top5" in json.loads(log.read_text())
    assert state_bytes(make_optimizer(copy.deepcopy(net()))) == 0
