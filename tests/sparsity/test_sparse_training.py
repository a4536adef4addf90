"""Zeros hold through training, come on schedule, grow back, are projected, and survive an interruption."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.errors import UsageError
from gossamer.sources.layer_weights import layer_weights
from gossamer.sparsity import Projection, Sparsifier, lottery_ticket, train_sparse


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))


def data(n=6):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8 * n, 1, 6, 6, generator=g)
    y = (x.mean((1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 1).long()
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, 8 * n, 8)]


def zeros(model):
    return sum(int((p == 0).sum()) for p in layer_weights(model).values())


TOTAL = 8 * 9 + 3 * 128


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "adamw", "ema": 0.5},
        {"optimizer": "sgd", "optimizer_in_backward": True},
    ],
)
def test_the_zeros_of_a_result_hold_through_training(options):
    start = gs.sparsify(net(), sparsity=0.8)
    trained = gs.fit(start, data(), epochs=2, lr=0.05, **options)
    for (name, before), after in zip(layer_weights(start.model).items(), layer_weights(trained.model).values(), strict=True):
        assert torch.equal(before == 0, after == 0), name
        assert not torch.equal(before, after)
    assert trained.plan == start.plan


def test_zeros_hold_after_channels_are_cut():
    start = gs.sparsify(net(), sparsity=0.5)
    pruned = gs.prune(start.model, (torch.zeros(1, 1, 6, 6),), ratio=0.5)
    both = pruned.with_(plan=start.plan + pruned.plan)
    trained = gs.fit(both, data(), lr=0.05).model
    assert trained[0].out_channels == 4
    assert torch.equal(trained[4].weight == 0, both.model[4].weight == 0)


@pytest.mark.parametrize("schedule", ["one_shot", "iterative", "cubic"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_every_schedule_ends_at_the_target(schedule, scope):
    result = train_sparse(net(), data(), sparsity=0.9, schedule=schedule, scope=scope, epochs=3, lr=0.01, updates=5)
    want = round(0.9 * TOTAL) if scope == "global" else round(0.9 * 72) + round(0.9 * 384)
    assert zeros(result.model) == want
    assert sum(e.nonzeros for e in result.plan) == TOTAL - want
    assert result.notes[0].startswith(f"{want / TOTAL:.1%} of 456")


def test_the_cubic_schedule_is_zhu_and_gupta_s():
    model = net()
    hold = Sparsifier(model, sparsity=0.8, steps=10, updates=4, begin=0.0, end=0.8)
    seen = []
    for _ in range(10):
        hold(model)
        seen.append(zeros(model) / TOTAL)
    want = {2: 1 - 0.75**3, 4: 1 - 0.5**3, 6: 1 - 0.25**3, 8: 1.0}
    for step, part in want.items():
        assert seen[step - 1] == pytest.approx(0.8 * part, abs=1 / TOTAL)
    assert seen == sorted(seen)


@pytest.mark.parametrize("regrow", ["gradient", "random"])
def test_regrowth_moves_connections_and_keeps_their_number(regrow):
    start = gs.sparsify(net(), sparsity=0.8, scope="global")
    made = train_sparse(net(), data(), sparsity=0.8, schedule="one_shot", regrow=regrow, epochs=4, lr=0.02, updates=6)
    assert abs(zeros(made.model) - round(0.8 * TOTAL)) <= 2  # a grown weight may still be exactly zero
    kept = torch.cat([(p != 0).reshape(-1) for p in layer_weights(start.model).values()])
    now = torch.cat([(p != 0).reshape(-1) for p in layer_weights(made.model).values()])
    assert int((now & ~kept).sum()) > 3


def test_gradients_grow_where_they_are_largest():
    model = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 3.0, 2.0, 1.0]]))
    model.weight.grad = torch.tensor([[0.1, 5.0, 0.2, 0.0, 0.0, 0.3]])
    hold = Sparsifier(model, sparsity=0.5, steps=4, schedule="one_shot", regrow="gradient", updates=4, end=1.0, regrow_fraction=0.4)
    hold(model)
    assert hold.masks()["weight"].tolist() == [[False, True, False, True, True, False]]


def test_projections_after_every_step():
    made = train_sparse(net(), data(), l0=40, scope="layer", epochs=2, lr=0.02)
    assert [int((p != 0).sum()) for p in layer_weights(made.model).values()] == [40, 40]
    seen = []

    class Watched(Projection):
        def __call__(self, model):
            super().__call__(model)
            seen.append([float(p.detach().abs().sum()) for p in layer_weights(model).values()])

    source = net()
    sums = [float(p.detach().abs().sum()) for p in layer_weights(source).values()]
    gs.fit(source, data(), lr=0.02, after_step=Watched(source, l1="50%"))
    assert len(seen) == 6
    assert all(now <= 0.5 * s * (1 + 1e-5) for step in seen for now, s in zip(step, sums, strict=True))
    whole = train_sparse(source, data(), l1="30%", scope="global", lr=0.02)
    assert sum(float(p.detach().abs().sum()) for p in layer_weights(whole.model).values()) <= 0.3 * sum(sums) * (1 + 1e-5)


def test_a_ticket_starts_from_the_first_weights():
    source, batches = net(), data()
    calls = []

    def train(network, data, **options):
        calls.append(network)
        return gs.fit(network, data, **options)

    ticket = lottery_ticket(source, batches, sparsity=0.75, rounds=2, epochs=2, lr=0.05, train=train)
    assert zeros(ticket.model) == round(0.75 * TOTAL)
    first = dict(source.named_parameters())
    for later in calls[1:]:
        for name, p in later.model.named_parameters():
            kept = p != 0
            assert torch.equal(p[kept], first[name][kept]), name
    assert zeros(calls[1].model) == round(0.5 * TOTAL)


def test_a_ticket_rewinds_to_the_step_asked_for():
    source, batches = net(), data()
    starts = []

    def train(network, data, **options):
        starts.append(network)
        return gs.fit(network, data, **options)

    lottery_ticket(source, batches, sparsity=0.5, rounds=1, rewind=0.5, epochs=2, lr=0.05, train=train)
    reached = {}

    def watch(model):
        reached[len(reached) + 1] = [p.clone() for p in model.parameters()]

    gs.fit(source, batches, epochs=2, lr=0.05, after_step=watch)
    for p, at in zip(starts[1].model.parameters(), reached[6], strict=True):
        assert torch.equal(p[p != 0], at[p != 0])


@pytest.mark.parametrize("regrow", [None, "gradient", "random"])
def test_an_interrupted_schedule_ends_in_the_same_masks_and_weights(regrow, tmp_path):
    options = {"sparsity": 0.8, "epochs": 3, "lr": 0.02, "updates": 6, "regrow": regrow}
    whole = train_sparse(net(), data(), **options)

    def stop(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sparse(net(), data(), **options, checkpoint=tmp_path, checkpoint_every=1, progress=stop)
    resumed = train_sparse(net(), data(), **options, checkpoint=tmp_path, checkpoint_every=1, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True))
    assert resumed.plan == whole.plan


def test_two_to_four_holds_through_training():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))
    made = train_sparse(model, data(), pattern="2:4", schedule="one_shot", epochs=2, lr=0.02).model
    for w in (made[1].weight, made[3].weight):
        assert bool(((w.reshape(len(w), -1, 4) != 0).sum(2) == 2).all())


def test_contradictions_are_one_line():
    for options, text in [
        ({"sparsity": 0.5, "schedule": "cubik"}, "cubic"),
        ({"pattern": "2:4"}, "one_shot"),
        ({"sparsity": 0.5, "regrow": "rigl"}, "gradient, random"),
        ({"sparsity": 0.5, "patience": 2, "val": data()}, "patience"),
        ({"sparsity": 0.5, "patience": 2, "val": data(), "schedule": "one_shot", "regrow": "random"}, "patience"),
        ({"sparsity": 0.5, "criterion": "wanda"}, "one_shot"),
        ({"l0": 4, "regrow": "random"}, "projections"),
        ({"sparsity": 0.5, "begin": 0.9, "end": 0.5}, "begin < end"),
        ({"sparsity": 0.5, "regrow": "gradient", "optimizer_in_backward": True, "optimizer": "sgd"}, "optimizer_in_backward"),
        ({}, "fraction of zeros"),
    ]:
        with pytest.raises(UsageError, match=text):
            train_sparse(net(), data(), **options)
    with pytest.raises(UsageError, match="rounds"):
        lottery_ticket(net(), data(), sparsity=0.5, rounds=0)


def test_a_result_is_continued_and_keeps_its_plan():
    pruned = gs.prune(net().eval(), (torch.zeros(1, 1, 6, 6),), ratio=0.5)
    made = train_sparse(pruned, data(), sparsity=0.5, epochs=2, lr=0.02)
    assert made.plan.edits[: len(pruned.plan)] == pruned.plan.edits
    assert made.plan.counts()["mask"] == 2
    assert made.before == pruned.before
    ticket = lottery_ticket(pruned, data(), sparsity=0.5, rounds=1, lr=0.02)
    assert ticket.plan.counts() == made.plan.counts()
