"""The training loop: what it leaves alone, modes, schedule, determinism, errors, and that it learns."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from gossamer.errors import SourceError, UsageError
from gossamer.models import resnet8
from gossamer.plan import Plan
from gossamer.result import Profile, Result
from gossamer.sources import Batch, Data, load_data, load_model
from gossamer.training import fit, lr_factor, make_optimizer
from gossamer.training.layout import takes_channels_last
from gossamer.training.objectives import as_objective


def toy(n: int = 48, batch: int = 8, *, shuffle: bool = True, generator: torch.Generator | None = None) -> DataLoader:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=g)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=batch, shuffle=shuffle, generator=generator)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))


def state(model: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_callers_model_is_untouched_and_modes_are_kept():
    model = net()
    model[1].eval()  # a frozen normalisation inside a network in train mode
    before, modes = state(model), [m.training for m in model.modules()]
    result = fit(model, toy(), epochs=2, lr=1e-2)
    assert same(before, state(model))
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == modes == [m.training for m in result.model.modules()]
    assert not same(before, state(result.model))
    assert all(p.grad is None for p in result.model.parameters())


class ModeSpy(nn.Module):
    """Notes whether it is in train mode, and whether gradients are on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.seen: list[tuple[bool, bool, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.training, self.body[1].training, torch.is_grad_enabled()))
        return self.body(x)


def test_train_mode_in_every_epoch_and_eval_mode_in_validation():
    spy = fit(ModeSpy().eval(), toy(32, 8), epochs=3, val=toy(16, 8)).model
    one_epoch = [(True, True, True)] * 4
    for epoch in range(3):
        seen = spy.seen[epoch * 8 : (epoch + 1) * 8]
        assert seen[:4] == one_epoch
        assert seen[4:] == [(False, False, False)] * 4  # loss and accuracy, two batches
    assert not spy.training


def test_batch_statistics_are_not_touched_by_validation():
    with_val = fit(net(), toy(), epochs=2, val=toy(24)).model
    without = fit(net(), toy(), epochs=2).model
    assert same(state(with_val), state(without))


def test_same_seed_same_weights_whatever_the_global_state():
    def run(seed: int) -> list[torch.Tensor]:
        return state(fit(net(), toy(), epochs=2, lr=1e-2, seed=seed).model)

    first = run(5)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert same(first, run(5))
    assert not same(first, run(6))
    torch.manual_seed(99)
    fit(net(), toy(), seed=5)
    torch.manual_seed(99)
    assert torch.equal(before, torch.get_rng_state())


def test_global_random_state_is_put_back():
    torch.manual_seed(7)
    model, data = net(), toy()
    before = torch.get_rng_state()
    fit(model, data)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["loader", "sampler", "global"])
def test_the_order_of_an_epoch_depends_on_seed_and_epoch_only(kind):
    x = torch.arange(24.0)[:, None]
    own = torch.Generator().manual_seed(3)
    data = TensorDataset(x, torch.zeros(24, dtype=torch.long))
    if kind == "sampler":
        loader = DataLoader(data, batch_size=4, sampler=RandomSampler(data, generator=own))
    else:
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=own if kind == "loader" else None)

    def orders(epochs: int, seed: int = 0) -> list[list[float]]:
        seen: list[float] = []

        def objective(model, batch):
            seen.extend(batch.args[0][:, 0].tolist())
            return model(*batch.args).square().mean()

        fit(nn.Linear(1, 1), loader, objective=objective, epochs=epochs, seed=seed)
        return [seen[24 * e : 24 * (e + 1)] for e in range(epochs)]

    before = own.get_state()
    three, two = orders(3), orders(2)
    assert three[:2] == two
    assert three[0] != three[1] != three[2]
    assert orders(1, seed=1)[0] != two[0]
    assert all(sorted(o) == x[:, 0].tolist() for o in three)
    assert torch.equal(before, own.get_state())


def test_steps_equal_a_plain_torch_loop():
    """AdamW, decay on matrices only, warm-up and cosine, against torch's own scheduler-free arithmetic."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    data = list(toy(shuffle=False))
    ours = fit(model, data, epochs=3, lr=2e-2, weight_decay=0.1, warmup=0.25)
    torch.manual_seed(2)
    reference = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    weights, biases = [reference[0].weight, reference[2].weight], [reference[0].bias, reference[2].bias]
    opt = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}], lr=2e-2)
    total, rising = 18, 4  # round(0.25 * 18)
    for step in range(total):
        x, y = data[step % 6]
        factor = (step + 1) / rising if step < rising else 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))
        for group in opt.param_groups:
            group["lr"] = 2e-2 * factor
        opt.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        opt.step()
    for a, b in zip(state(ours.model), state(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_sgd_with_momentum_by_hand():
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5]])
    ours = fit(model, [(x, y)] * 4, objective=nn.MSELoss(), optimizer="sgd", lr=0.05, momentum=0.8, weight_decay=0.2, warmup=0.0)
    w, v = torch.ones(1, 2), torch.zeros(1, 2)
    for step in range(4):
        grad = 2 * (x @ w.T - y) * x + 0.2 * w
        v = 0.8 * v + grad
        w = w - 0.05 * 0.5 * (1 + math.cos(math.pi * step / 4)) * v
    torch.testing.assert_close(ours.model.weight, nn.Parameter(w))


def test_schedule_rises_then_falls():
    rates = [lr_factor(s, 100, warmup=0.1) for s in range(100)]
    assert rates[:10] == [pytest.approx((s + 1) / 10) for s in range(10)]
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001
    assert lr_factor(0, 1) == 1.0


def test_biases_and_norms_are_not_decayed():
    model = resnet8(width=4)
    groups = make_optimizer(model, weight_decay=0.3).param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            assert (id(p) in decayed) == (isinstance(module, nn.Conv2d | nn.Linear) and name == "weight")


def test_frozen_parameters_stay():
    model = net()
    model[0].requires_grad_(False)
    trained = fit(model, toy(), lr=1e-1).model
    assert torch.equal(trained[0].weight, model[0].weight)
    assert not torch.equal(trained[4].weight, model[4].weight)
    assert not trained[0].weight.requires_grad


def test_clipping_bounds_the_gradient():
    x, y = torch.full((1, 1), 100.0), torch.zeros(1, 1)
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    moved = fit(model, [(x, y)], objective=nn.MSELoss(), optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.1, warmup=0, clip=1.0)
    assert (1 - moved.model.weight).item() == pytest.approx(0.1, rel=1e-4)


def test_the_history_is_the_mean_over_samples_and_goes_into_the_log(tmp_path):
    model = nn.Linear(6, 2)
    data = list(toy(20, 8, shuffle=False))  # batches of 8, 8 and 4
    log = tmp_path / "logs" / "log.jsonl"
    result = fit(model, data, epochs=2, lr=1e-12, val=data, log=log)
    x, y = torch.cat([b[0] for b in data]), torch.cat([b[1] for b in data])
    want = F.cross_entropy(model(x), y).item()
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    for record in result.history:
        assert record["loss"] == pytest.approx(want, rel=1e-5)
        assert record["val_loss"] == pytest.approx(want, rel=1e-5)
        assert record["val_accuracy"] == pytest.approx(accuracy)
    assert [json.loads(line) for line in log.read_text().splitlines()] == list(result.history)
    assert result.steps == 6
    assert "val_accuracy" in str(result)


def test_progress_counts_steps():
    seen: list[tuple[int, int]] = []
    fit(nn.Linear(6, 2), toy(), epochs=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 12) for i in range(1, 13)]


def test_a_result_comes_back_as_a_result():
    empty = Profile(0, 0, 0, 0)
    given = Result(net(), Plan(), empty, empty, notes=("kept",))
    trained = fit(given, toy(), lr=1e-2)
    assert isinstance(trained, Result)
    assert trained.notes == ("kept",)
    assert trained.model is not given.model
    assert not same(state(trained.model), state(given.model))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.a(x) + self.b(y)}


def test_several_inputs_dict_inputs_and_dict_outputs():
    x, y, t = torch.randn(5, 3), torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1])
    positional = fit(TwoInputs(), [(x, y, t)] * 20, lr=0.1)
    keyword = fit(TwoInputs(), [({"x": x, "y": y}, t)] * 20, lr=0.1)
    assert positional.history[0]["loss"] < 0.6
    assert keyword.history[0]["loss"] < 0.6
    ignored = fit(TwoInputs(), [(x, y, t, "path.jpg")], example_inputs=(x, y))
    assert ignored.steps == 1


def test_objectives_of_both_kinds():
    batch = Batch((torch.ones(2, 3),), {}, torch.zeros(2, 3))
    assert as_objective(F.mse_loss)(nn.Identity(), batch).item() == 1
    assert as_objective(lambda model, batch: model(*batch.args).sum())(nn.Identity(), batch).item() == 6
    unlabelled = fit(nn.Linear(3, 3), [torch.ones(2, 3)] * 3, objective=lambda model, batch: model(*batch.args).square().mean())
    assert unlabelled.history[0]["objective"] == "<lambda>"


# Memory layout


class Viewer(nn.Module):
    """Flattens by view, which channels-last tensors cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 36, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.head(y.view(y.shape[0], -1))


def test_channels_last_where_the_network_takes_it_and_not_elsewhere():
    x, y = torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 0, 1])
    fine = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    loss = as_objective(None)
    rng = torch.get_rng_state()
    assert takes_channels_last(fine, loss, Batch((x,), {}, y))
    assert not takes_channels_last(Viewer(), loss, Batch((x,), {}, y))
    assert not takes_channels_last(nn.Sequential(nn.Flatten(), nn.Linear(108, 2)), loss, Batch((x,), {}, y))
    assert rng.shape == torch.get_rng_state().shape
    assert fine.training
    for model in (fine, Viewer()):
        trained = fit(model, [(x, y)] * 30, lr=1e-2)
        assert trained.history[0]["loss"] < 0.6
        assert all(p.is_contiguous() for p in trained.model.parameters())


def test_layouts_agree():
    data = [(torch.randn(8, 3, 16, 16), torch.arange(8) % 10)] * 3
    torch.manual_seed(0)
    model = resnet8(width=4)
    a, b = (fit(model, data, lr=1e-3, channels_last=layout) for layout in (True, False))
    assert a.history[0]["loss"] == pytest.approx(b.history[0]["loss"], rel=1e-4)
    torch.testing.assert_close(a.model.head.weight, b.model.head.weight, rtol=1e-2, atol=1e-3)


# Errors


def test_a_loss_that_is_not_finite_names_the_step():
    good = (torch.ones(2, 6), torch.tensor([0, 1]))
    bad = (torch.full((2, 6), float("nan")), torch.tensor([0, 1]))
    with pytest.raises(UsageError, match="nan at step 3 of epoch 1"):
        fit(nn.Linear(6, 2), [good, good, bad, good])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs >= 1"),
        ({"lr": 0.0}, "lr > 0"),
        ({"warmup": 1.0}, "warmup"),
        ({"optimizer": "adam"}, "did you mean 'adamw'"),
        ({"momentum": 1.0}, "momentum"),
        ({"clip": 0.0}, "clip > 0"),
        ({"objective": lambda out, target: out}, "one number"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UsageError, match=message):
        fit(net(), toy(), **options)


def test_bad_data():
    with pytest.raises(SourceError, match="empty"):
        fit(net(), [])
    with pytest.raises(SourceError, match="only once"):
        fit(net(), iter(toy()))
    with pytest.raises(SourceError, match="iterable of batches"):
        fit(net(), torch.zeros(3, 6))
    dataset = TensorDataset(torch.zeros(2, 6))
    with pytest.raises(SourceError, match=r"pass data\.loader"):
        fit(net(), Data("mine", dataset, dataset, 2, (1, 6)))
    with pytest.raises(SourceError, match="no target"):
        fit(net(), [torch.zeros(3, 6)])
    with pytest.raises(SourceError, match=r"label is 7.*2 outputs"):
        fit(net(), [(torch.zeros(2, 6), torch.tensor([0, 7]))])
    with pytest.raises(SourceError, match="validation data is empty"):
        fit(net(), toy(), val=[])
    with pytest.raises(UsageError, match="nothing to train"):
        fit(net().requires_grad_(False), toy())


class Stream:
    """Batches without a length."""

    def __iter__(self):
        yield from toy(16, 8)


def test_data_without_a_length_is_counted():
    assert fit(net(), Stream(), epochs=2).steps == 4


# Learning


def test_digits_reach_95_percent_in_seconds():
    pytest.importorskip("sklearn")
    data = load_data("digits")
    model = load_model("gossamer:resnet8?width=8&in_channels=1").model
    result = fit(model, data.loader("train", shuffle=True), epochs=4, lr=1e-2, val=data.loader("val", batch_size=180))
    assert result.history[-1]["val_accuracy"] >= 0.95
    with torch.no_grad():  # counted apart from the loop
        hits = sum(int(result.model(x[None]).argmax() == y) for x, y in (data.val[i] for i in range(len(data.val))))
    assert hits / len(data.val) == pytest.approx(result.history[-1]["val_accuracy"], abs=0.006)
