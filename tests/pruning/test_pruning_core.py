"""Structured pruning against loops, closed forms, and networks in which the right answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import gossamer as gs
from gossamer.calibration import JointMoments, reestimate_batch_norm
from gossamer.errors import BudgetError, NothingToDo, SelectorError, UsageError
from gossamer.pruning.compensation import predict
from gossamer.pruning.costs import mac_costs, parameter_costs
from gossamer.pruning.importance import importance_scores
from gossamer.surgery import cut
from gossamer.trace import costs, trace


def network(bias: bool = False) -> nn.Sequential:
    def block(i, o, g=1):
        return [nn.Conv2d(i, o, 3, padding=1, groups=g, bias=bias), nn.BatchNorm2d(o), nn.ReLU()]

    return nn.Sequential(*block(3, 16), *block(16, 16, 16), *block(16, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)).eval()


INPUTS = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def batches(n: int = 4) -> list[torch.Tensor]:
    return [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(n)]


def test_magnitude_equals_a_plain_loop():
    net = network().requires_grad_(False)
    channels = trace(net, INPUTS).channels
    scores = importance_scores(net, channels, "l2", example_inputs=INPUTS)
    group = channels.groups[0]
    want = []
    for c in range(16):
        total = float(net[0].weight[c].square().sum()) + float(net[3].weight[c].square().sum()) + float(net[6].weight[:, c].square().sum())
        want.append(total**0.5)
    want = np.array(want) / np.mean(want)
    assert np.allclose(scores[group.classes].numpy(), want, rtol=1e-6)


def test_taylor_equals_autograd_by_hand():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    channels = trace(net, (x[:1],)).channels
    scores = importance_scores(net, channels, "taylor", example_inputs=(x[:1],), calibration=[(x, y)])
    nn.functional.cross_entropy(net(x), y).backward()
    a, b = net[0].weight * net[0].weight.grad, net[2].weight * net[2].weight.grad
    want = (a.sum(1) + b.sum(0)).detach().double() ** 2  # the bias is pointwise: it goes with its channel, but is no slice of a weight
    assert torch.allclose(scores[channels.groups[0].classes], want / want.mean(), rtol=1e-4)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "resnext50_32x4d", "densenet121"])
def test_the_cost_model_is_what_cutting_really_gives(name):
    net = torchvision.models.get_model(name, weights=None).eval()
    inputs = (torch.randn(1, 3, 64, 64),)
    traced = trace(net, inputs)
    removed = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    for g in traced.channels.groups:
        removed[g.classes[: len(g.classes) // 3]] = True
    shapes = {n: tuple(t.shape) for n, t in net.state_dict().items()}
    after = costs(cut(net, traced, removed).model, inputs)
    assert mac_costs(traced.channels, traced.profile, shapes).total(removed) == pytest.approx(after.macs)
    parameters = {n: tuple(p.shape) for n, p in net.named_parameters()}
    assert parameter_costs(traced.channels, traced.profile, parameters).total(removed) == pytest.approx(after.params)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("target", [0.8, 0.5])
def test_the_macs_target_is_met_and_hardly_undershot(scope, target):
    net = torchvision.models.mobilenet_v2(weights=None).eval()
    result = gs.prune(net, (torch.randn(1, 3, 64, 64),), macs=target, scope=scope)
    assert target - 0.03 < result.after.macs / result.before.macs <= target * 1.005
    assert result.proof.holds
    assert result.after == gs.profile(result.model, (torch.randn(1, 3, 64, 64),))


def test_params_and_ratio_targets():
    net = torchvision.models.resnet18(weights=None).eval()
    inputs = (torch.randn(1, 3, 64, 64),)
    assert gs.prune(net, inputs, params=0.5).after.params <= 0.5 * 11_689_512 * 1.005
    half = gs.prune(net, inputs, ratio=0.5, scope="layer").model
    assert half.conv1.out_channels == 32
    assert half.layer4[0].conv1.out_channels == 256


def test_round_to_and_floor():
    result = gs.prune(network(), INPUTS, macs=0.5, round_to=4, floor=0.25)
    for m in result.model.modules():
        if isinstance(m, nn.Conv2d):
            assert m.out_channels % 4 == 0
            assert m.out_channels >= 4


def test_ignored_modules_keep_their_channels():
    result = gs.prune(network(), INPUTS, macs=0.7, ignore=["6"])
    assert result.model[6].out_channels == 24
    assert result.model[0].out_channels < 16
    with pytest.raises(SelectorError, match="matches no module"):
        gs.prune(network(), INPUTS, macs=0.7, ignore=["features*"])


def test_the_plan_rebuilds_the_network_and_the_source_is_untouched():
    net = network().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    result = gs.prune(net, INPUTS, macs=0.6, calibration=batches())
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    rebuilt = result.plan.apply(net).eval()
    rebuilt.load_state_dict(result.model.state_dict())
    assert torch.equal(rebuilt(*INPUTS), result.model.eval()(*INPUTS))


def test_the_same_seed_gives_the_same_network():
    one, two, other = (gs.prune(network_of(0), INPUTS, macs=0.6, importance="random", seed=s, calibration=batches()) for s in (1, 1, 2))
    assert one.plan == two.plan
    assert all(torch.equal(v, two.model.state_dict()[k]) for k, v in one.model.state_dict().items())
    assert one.plan != other.plan


def network_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return network()


@pytest.mark.parametrize("far", [0.0, 3000.0])
def test_ridge_is_its_closed_form(far):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6) + far).astype(np.float32 if far else np.float64)
    keep = np.array([True, True, False, True, False, True])
    parts = [JointMoments.of(torch.from_numpy(part[:, keep].T[None]), torch.from_numpy(part.T[None])) for part in np.split(x, 5)]
    moments = sum(parts[1:], parts[0])
    a, b = predict(moments, torch.from_numpy(keep), 1e-9)
    design = np.hstack([x[:, keep], np.ones((500, 1))])
    want = np.linalg.lstsq(design.astype(np.float64), x.astype(np.float64), rcond=None)[0]
    assert np.allclose(a.numpy(), want[:-1].T, atol=1e-4)
    assert np.allclose((x[:, keep] @ a.numpy().T + b.numpy()), design @ want, atol=1e-3)


def test_channels_that_copy_others_cost_nothing_after_compensation():
    """Half of the hidden units are linear combinations of the other half: removing them must change nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Identity(), nn.Linear(8, 3, bias=False)).eval()
    with torch.no_grad():
        mix = torch.randn(4, 4)
        net[0].weight[4:] = mix @ net[0].weight[:4]
        net[0].bias[4:] = mix @ net[0].bias[:4] + 1
    traced = trace(net, (torch.randn(1, 4),))
    order = traced.channels.groups[0].classes

    def keep_the_first_half(model, channels):
        scores = torch.ones(channels.num_classes)
        scores[order[4:]] = 0
        return scores

    data = [torch.randn(64, 4) for _ in range(4)]
    x = torch.randn(32, 4)
    plain = gs.prune(net, (x[:1],), ratio=0.5, importance=keep_the_first_half)
    result = gs.prune(net, (x[:1],), ratio=0.5, importance=keep_the_first_half, calibration=data)
    with torch.no_grad():
        error, without = ((r.model(x) - net(x)).norm().item() for r in (result, plain))
    assert error < 0.2 * without
    assert "add_bias" in result.plan.counts(), "the consumer had no bias and no batch norm follows it"


def test_compensation_lowers_the_error_on_data_it_has_not_seen():
    torch.manual_seed(1)
    net = network()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    data, unseen = batches(6), torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        want = net(unseen)
        plain = gs.prune(net, INPUTS, macs=0.6).model(unseen)
        helped = gs.prune(net, INPUTS, macs=0.6, calibration=data, reestimate_bn=False).model(unseen)
    assert float((helped - want).norm()) < 0.7 * float((plain - want).norm())


def test_batch_norm_statistics_are_those_of_the_data():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    x = torch.randn(64, 3, 5, 5) * 3 + 1
    assert reestimate_batch_norm(net, [x[:32], x[32:]], (x[:1],)) == 2
    means = torch.stack([x[:32].mean((0, 2, 3)), x[32:].mean((0, 2, 3))]).mean(0)
    variances = torch.stack([x[:32].transpose(0, 1).flatten(1).var(1), x[32:].transpose(0, 1).flatten(1).var(1)]).mean(0)
    assert torch.allclose(net[0].running_mean, means, atol=1e-5)
    assert torch.allclose(net[0].running_var, variances, rtol=1e-4)
    assert net.training
    assert net[0].momentum == 0.1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, UsageError, "exactly one"),
        ({"macs": 0.5, "ratio": 0.5}, UsageError, "exactly one"),
        ({"macs": 1.5}, UsageError, "between 0 and 1"),
        ({"macs": 0.5, "importance": "l3"}, UsageError, "known are"),
        ({"macs": 0.5, "importance": "taylor"}, UsageError, "needs calibration"),
        ({"macs": 0.5, "scope": "everywhere"}, UsageError, "global"),
        ({"macs": 0.5, "form": "grph"}, UsageError, "did you mean 'graph'"),
        ({"macs": 0.01}, BudgetError, "lowest possible"),
        ({"ratio": 0.5, "ignore": ["*"]}, NothingToDo, "nothing can be pruned"),
    ],
)
def test_mistakes_are_one_line(options, error, words):
    with pytest.raises(error, match=words) as e:
        gs.prune(network(), INPUTS, **options)
    assert "\n" not in str(e.value)


def test_weights_that_are_not_finite_are_named():
    net = network()
    with torch.no_grad():
        net[3].weight[0] = float("inf")
    with pytest.raises(UsageError, match=r"3\.weight"):
        gs.prune(net, INPUTS, macs=0.5)


def test_nothing_prunable_says_why():
    with pytest.raises(NothingToDo, match="output"):
        gs.prune(nn.Linear(4, 2), (torch.randn(1, 4),), macs=0.5)


def test_fisher_equals_autograd_by_hand():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    data = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(2)]
    channels = trace(net, (data[0][0][:1],)).channels
    scores = importance_scores(net, channels, "fisher", example_inputs=(data[0][0][:1],), calibration=data)
    want = torch.zeros(6, dtype=torch.float64)
    for x, y in data:
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        want += (
            ((net[0].weight * net[0].weight.grad).square().sum(1) + (net[2].weight * net[2].weight.grad).square().sum(0)).detach().double()
        )
    assert torch.allclose(scores[channels.groups[0].classes], want / want.mean(), rtol=1e-4)


def test_bn_scale_and_geometric_median_equal_plain_loops():
    net = network()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(-1, 1)
    channels = trace(net, INPUTS).channels
    first = channels.groups[0]
    want = net[1].weight.abs() + net[4].weight.abs()  # the convolution and the depthwise one after it: one class, two norms
    scores = importance_scores(net, channels, "bn_scale", example_inputs=INPUTS)
    assert torch.allclose(scores[first.classes], (want / want.mean()).double().detach(), rtol=1e-5)
    filters = torch.cat([net[0].weight.flatten(1), net[3].weight.flatten(1)], 1).detach().numpy()
    distances = np.array([sum(np.linalg.norm(a - b) for b in filters) for a in filters])
    scores = importance_scores(net, channels, "fpgm", example_inputs=INPUTS)
    assert np.allclose(scores[first.classes].numpy(), distances / distances.mean(), rtol=1e-5)


def test_activation_importance_is_the_mean_magnitude_at_the_consumer():
    net = network()
    channels = trace(net, INPUTS).channels
    scores = importance_scores(net, channels, "activation", example_inputs=INPUTS, calibration=batches(2))
    with torch.no_grad():
        x = torch.cat([net[:6](b) for b in batches(2)])  # what the third convolution reads
    want = x.abs().mean((0, 2, 3)).double()
    assert torch.allclose(scores[channels.groups[0].classes], want / want.mean(), rtol=1e-4)


@pytest.mark.parametrize("name", ["bn_scale", "fpgm", "fisher", "activation"])
def test_every_criterion_prunes(name):
    result = gs.prune(network(), INPUTS, ratio=0.5, importance=name, calibration=batches(2))
    assert result.proof.holds


def test_batch_norm_scale_without_batch_norms_says_so():
    with pytest.raises(UsageError, match="l2"):
        gs.prune(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval(), (torch.zeros(1, 4),), ratio=0.5, importance="bn_scale")


def test_groups_choose_channels_of_their_own_and_lose_the_least():
    """By position, the second group would lose what matters most to it; each group loses its own least important two."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
        for c in (0, 1, 6, 7):  # unimportant: the first two of one group, the last two of the other
            net[0].weight[c] = 0.01
            net[2].weight[:4, c % 4] *= 0.01 if c < 4 else 1
            net[2].weight[4:, c % 4] *= 0.01 if c >= 4 else 1
    result = gs.prune(net, (torch.randn(1, 3, 4, 4),), ratio=0.5, scope="layer")
    assert result.proof.holds
    kept = next(e for e in result.plan if e.tensor == "0.weight")
    assert kept.index == (2, 3, 4, 5)


def test_the_layer_table_interpolates_what_it_measured():
    from gossamer.profiling.layers import LayerTable, layer_shapes, measure_layers, widths

    assert widths(64) == [8, 16, 32, 48, 64]
    table = LayerTable(np.array([8.0, 16.0]), np.array([8.0, 16.0]), np.array([[1.0, 2.0], [3.0, 5.0]]))
    assert table(8, 16) == 2.0
    assert table(12, 16) == table(16, 16) == 5.0  # 12 channels take the kernel of 16
    assert table(4, 8) == 1.0
    net = network()
    layers = layer_shapes(net, gs.profile(net, INPUTS))
    assert [s.op for s, _, _ in layers.values()] == ["conv", "depthwise", "conv", "linear"]
    assert layers[0][0].rows == (2, 8, 8)
    measured = measure_layers([layers[0]])
    assert (measured[layers[0]].ms > 0).all()


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnext50_32x4d"])
def test_the_latency_model_looks_up_the_channels_that_cutting_leaves(name, monkeypatch):
    """Oracle: the layers of the cut network, looked up one by one; a table that tells inputs from outputs stands in for the runtime."""
    from gossamer.profiling import layers
    from gossamer.pruning.latency import latency_costs

    net = torchvision.models.get_model(name, weights=None).eval()
    inputs = (torch.randn(1, 3, 64, 64),)
    monkeypatch.setattr(layers, "measure_layers", lambda found, **_: dict.fromkeys(found, lambda ins, outs: ins + 1000 * outs))
    traced = trace(net, inputs)
    model = latency_costs(net, traced.channels, traced.profile)
    removed = torch.zeros(traced.channels.num_classes, dtype=torch.bool)
    assert (model.marginal(removed)[torch.cat([g.classes for g in traced.channels.groups])] > 0).all()
    for g in traced.channels.groups:
        removed[g.classes[: len(g.classes) // 3]] = True
    made = cut(net, traced, removed).model
    want = sum(m.in_channels + 1000 * m.out_channels for m in made.modules() if isinstance(m, nn.Conv2d))
    want += sum(m.in_features + 1000 * m.out_features for m in made.modules() if isinstance(m, nn.Linear))
    assert model.total(removed) == pytest.approx(want)


def test_a_latency_target_is_measured_on_the_pruned_network():
    torch.manual_seed(0)
    blocks = [m for i, o in ((3, 64), (64, 64), (64, 64)) for m in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU())]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)).eval()
    result = gs.prune(net, (torch.randn(1, 3, 48, 48),), latency=0.6)
    assert result.proof.holds
    assert any("ONNX Runtime, 1 thread" in n for n in result.notes)
    assert all(m.out_channels % 8 == 0 for m in result.model if isinstance(m, nn.Conv2d))
    assert result.after.macs < 0.8 * result.before.macs
    with pytest.raises(UsageError, match="milliseconds"):
        gs.prune(net, (torch.randn(1, 3, 48, 48),), latency="5 parsecs")


@pytest.mark.parametrize("target", [{"macs": 0.5}, {"params": 0.5}, {"ratio": 0.5}])
def test_steps_end_where_one_shot_does_and_the_plan_replays(target):
    from gossamer.pruning import prune_in_steps

    net, seen = network(), []

    def recover(model, step):
        seen.append(gs.profile(model, INPUTS).macs)
        return model

    result = prune_in_steps(net, INPUTS, schedule="cubic", steps=3, recover=recover, **target)
    assert len(seen) == 3
    assert seen == sorted(seen, reverse=True)
    if "ratio" not in target:
        kind = next(iter(target))
        assert 0.4 < getattr(result.after, kind) / getattr(result.before, kind) <= 0.5 * 1.005
    assert result.proof.holds
    again = result.plan.apply(net)
    again.load_state_dict(result.model.state_dict())
    assert torch.equal(again(*INPUTS), result.model(*INPUTS))


def test_steps_as_a_graph_recover_a_module():
    from torch import fx

    from gossamer.pruning import prune_in_steps

    seen = []

    def recover(model, step):
        seen.append(type(model))
        return model

    result = prune_in_steps(network(), INPUTS, ratio=0.5, steps=2, form="graph", recover=recover)
    assert fx.GraphModule not in seen
    assert isinstance(result.model, fx.GraphModule)
    again = result.plan.apply(network())
    again.load_state_dict(result.model.state_dict())
    assert torch.equal(again(*INPUTS), result.model(*INPUTS))


def test_an_unknown_schedule_is_one_line():
    from gossamer.pruning import prune_in_steps

    with pytest.raises(UsageError, match="cubic"):
        prune_in_steps(network(), INPUTS, schedule="cubik", ratio=0.5)


def test_compensation_reaches_the_output_projection_of_an_attention():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    net, data = Block().eval(), [torch.randn(32, 5, 16) for _ in range(4)]
    with torch.no_grad():  # heads that say nearly the same, so that those that stay can speak for those that go
        w = net.attention.in_proj_weight.view(3, 4, 4, 16)
        w[:, 2:] = w[:, :2] + 0.01 * torch.randn_like(w[:, :2])
        net.attention.out_proj.weight[:, 8:] *= 0.7
    x = torch.randn(64, 5, 16)
    errors = []
    for compensate in (False, True):
        result = gs.prune(net, (data[0][:1],), ratio=0.5, calibration=data, compensate=compensate, ignore=["head"], scope="layer")
        assert result.model.attention.num_heads == 2
        errors.append(float((result.model(x) - net(x)).square().mean().detach()))
    assert errors[1] < 0.75 * errors[0]
