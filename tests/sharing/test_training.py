"""Trained codebooks: gradients against finite differences and sums over members, and that sharing outlives training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gossamer as gs
from gossamer.errors import PlanError, UsageError
from gossamer.plan import Plan, Share, snap
from gossamer.sharing import cluster, fine_tune, share_parameters, unshare
from gossamer.sources.layer_weights import layer_weights


def shared(net: nn.Module, **options) -> tuple[nn.Module, list[Share]]:
    """A copy whose codebooks are trained parameters, and the edits."""
    result = cluster(net, **options)
    network = copy.deepcopy(result.model)
    assert share_parameters(network, result.plan.edits) == ()
    return network, list(result.plan.edits)


def batches(*shape: int, classes: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(64, *shape)
    y = (x.flatten(1)[:, :classes]).argmax(1)
    return [(x, y)]


def distinct(t: torch.Tensor) -> int:
    return len(t.unique())


@pytest.mark.parametrize("zeros", [False, True])
def test_gradients_are_sums_over_members_and_finite_differences(zeros):
    net = nn.Linear(12, 8).double()
    if zeros:
        with torch.no_grad():
            net.weight[torch.rand(8, 12) < 0.3] = 0
    plain = cluster(net, bits=2, groups=2).model
    network, (edit,) = shared(net, bits=2, groups=2)
    assert edit.zeros == zeros
    x = torch.randn(5, 12, dtype=torch.float64)

    def loss(model: nn.Module) -> torch.Tensor:
        return model(x).tanh().square().sum()

    loss(plain).backward()
    loss(network).backward()
    values = network.parametrizations.weight.original
    by_hand = []
    for block, book in enumerate(edit.codebooks):
        rows = slice(4 * block, 4 * block + 4)
        w, g = plain.weight.detach()[rows], plain.weight.grad[rows]
        by_hand += [float(g[w == v].sum()) for v in book]
    assert torch.allclose(values.grad, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-12)
    numeric = torch.zeros_like(values)
    with torch.no_grad():
        for i in range(len(values)):
            for sign in (1, -1):
                values[i] += sign * 1e-6
                numeric[i] += sign * loss(network) / 2e-6
                values[i] -= sign * 1e-6
    assert torch.allclose(values.grad, numeric, rtol=1e-6, atol=1e-8)


LAYERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)), (20,)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4)),
        (3, 8, 8),
    ),
    "recurrent": (lambda: nn.Sequential(nn.LSTM(10, 16, num_layers=2), Last(), nn.Linear(16, 4)), (5, 10)),
    "attention": (lambda: Attention(), (5, 20)),
}


class Last(nn.Module):
    def forward(self, outputs):
        return outputs[0][:, -1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(20, 4, batch_first=True), nn.Linear(20, 4)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0][:, 0])


@pytest.mark.parametrize("kind", LAYERS)
def test_sharing_alone_changes_nothing_and_is_undone(kind):
    make, shape = LAYERS[kind]
    net, x = make().eval(), torch.randn(3, *shape)
    result = cluster(net, bits=3)
    network, edits = shared(net, bits=3)
    with torch.no_grad():
        assert torch.equal(network(x), result.model(x))
        assert torch.equal(copy.deepcopy(network)(x), result.model(x))
    assert unshare(network) == edits
    assert list(network.state_dict()) == list(net.state_dict())
    assert [type(m) for m in network.modules()] == [type(m) for m in net.modules()]
    assert all(torch.equal(t, network.state_dict()[n]) for n, t in result.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(network(x), result.model(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_codebooks_are_trained_and_their_sizes_hold(kind, tmp_path):
    make, shape = LAYERS[kind]
    net, data = make(), batches(*shape)
    result = cluster(net, bits=3)
    before = {n: t.clone() for n, t in result.model.state_dict().items()}
    tuned = fine_tune(result, data, epochs=40, lr=0.02, seed=1)
    assert all(torch.equal(t, before[n]) for n, t in result.model.state_dict().items())
    start, end = (nn.functional.cross_entropy(m(data[0][0]), data[0][1]).item() for m in (result.model.train(), tuned.model))
    assert end < 0.9 * start
    for name, w in layer_weights(tuned.model).items():
        old = before[name]
        assert distinct(w) == distinct(old) and not torch.equal(w, old)
        pairs = torch.stack([old.flatten(), w.detach().flatten()]).unique(dim=1)
        assert pairs.shape[1] == distinct(old)  # entries that shared a value still do
    assert [e.tensors for e in tuned.plan] == [e.tensors for e in result.plan]
    for edit in tuned.plan:
        values = torch.cat([tuned.model.get_parameter(t).flatten() for t in edit.tensors]).unique()
        assert values.tolist() == list(edit.codebooks[0])
        assert all(
            torch.equal(snap(w, edit.codebooks, zeros=edit.zeros), w) for w in (tuned.model.get_parameter(t).detach() for t in edit.tensors)
        )
    loaded = gs.load(tuned.save(tmp_path / "run"), net)
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in tuned.model.state_dict().items())
    assert all(p.requires_grad for p in tuned.model.parameters())


def test_zeros_stay_zero_in_training():
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    with torch.no_grad():
        net[0].weight[torch.rand(30, 20) < 0.5] = 0
    tuned = fine_tune(cluster(net), batches(20), epochs=5, lr=0.01)
    assert torch.equal(tuned.model[0].weight == 0, net[0].weight == 0)
    assert tuned.plan.edits[0].zeros


def test_tensors_of_one_edit_train_one_codebook_and_tied_weights_stay_tied():
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 4))
    net[1].weight = net[0].weight
    result = cluster(net, scope="network", bits=3)
    tuned = fine_tune(result, batches(20), epochs=3, lr=0.01)
    weights = [tuned.model[i].weight for i in range(4)]
    assert weights[0] is weights[1] and weights[2] is not weights[0]
    (edit,) = tuned.plan.edits
    assert edit.tensors == ("0.weight", "2.weight", "3.weight")
    assert torch.cat([w.flatten() for w in weights]).unique().tolist() == list(edit.codebooks[0])
    assert edit.codebooks != result.plan.edits[0].codebooks


def test_averaging_and_validation_work_with_codebooks():
    data = batches(5, 10)
    result = cluster(LAYERS["recurrent"][0](), bits=2)
    tuned = fine_tune(result, data, epochs=3, lr=0.01, ema=0.9, val=data, patience=2)
    assert all(distinct(w) == 4 for w in layer_weights(tuned.model).values())


def test_a_stopped_training_ends_in_the_same_codebooks(tmp_path):
    net, data = LAYERS["convolutions"][0](), batches(3, 8, 8)
    result = cluster(net, bits=3, scope="network")
    whole = fine_tune(result, data, epochs=4, lr=0.01)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        fine_tune(result, data, epochs=4, lr=0.01, checkpoint=tmp_path, progress=stop)
    again = fine_tune(result, data, epochs=4, lr=0.01, checkpoint=tmp_path, resume=True)
    assert again.plan == whole.plan
    assert all(torch.equal(t, whole.model.state_dict()[n]) for n, t in again.model.state_dict().items())


def test_what_a_weight_is_computed_from_is_not_trained_and_said():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(20, 30)), nn.ReLU(), nn.Linear(30, 4))
    result = cluster(net, bits=2)
    tuned = fine_tune(result, batches(20), epochs=2, lr=0.01)
    name = "0.parametrizations.weight.original1"
    assert torch.equal(tuned.model.get_parameter(name), result.model.get_parameter(name))
    assert any(name in n and "not trained" in n for n in tuned.notes)
    assert all(p.requires_grad for p in tuned.model.parameters())
    assert tuned.plan.edits[0] == result.plan.edits[0] and tuned.plan.edits[1] != result.plan.edits[1]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_older_weight_norm_is_trained():
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(20, 30)), nn.ReLU(), nn.Linear(30, 4))
    tuned = fine_tune(cluster(net, bits=2), batches(20), epochs=2, lr=0.01)
    assert distinct(tuned.model[0].weight_v) == 4


def test_frozen_weights_stay_frozen():
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    net[0].weight.requires_grad_(False)
    result = cluster(net, bits=2)
    tuned = fine_tune(result, batches(20), epochs=2, lr=0.01)
    assert torch.equal(tuned.model[0].weight, result.model[0].weight) and not tuned.model[0].weight.requires_grad


def test_of_two_edits_of_one_weight_the_last_is_trained():
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 4))
    twice = cluster(cluster(net, bits=5, scope="network"), bits=2, ignore=["1"])
    tuned = fine_tune(twice, batches(20), epochs=2, lr=0.01)
    assert [(e.tensors, e.bits) for e in tuned.plan] == [(("0.weight",), 5), (("1.weight",), 5), (("0.weight",), 2)]
    assert tuned.plan.edits[0].codebooks == twice.plan.edits[0].codebooks
    assert distinct(tuned.model[0].weight) == 4 and distinct(tuned.model[1].weight) > 16


def test_other_edits_of_the_plan_stay():
    net, inputs = LAYERS["convolutions"][0]().eval(), (torch.randn(2, 3, 8, 8),)
    result = cluster(gs.prune(net, inputs, ratio=0.3), bits=3)
    tuned = fine_tune(result, batches(3, 8, 8), epochs=1)
    assert [e.kind for e in tuned.plan] == [e.kind for e in result.plan]
    assert isinstance(tuned.plan, Plan) and tuned.after == result.after


def test_misuse_is_one_line():
    net = nn.Sequential(nn.Linear(20, 4))
    with pytest.raises(UsageError, match="trains no codebook"):
        unshare(net)
    with pytest.raises(PlanError, match=r"no parameter '0\.wieght'; did you mean '0\.weight'"):
        share_parameters(net, [Share(tensors=("0.wieght",), bits=2, codebooks=((0.0, 1.0),), zeros=False)])
    with pytest.raises(PlanError, match="3 codebooks do not fit"):
        share_parameters(net, [Share(tensors=("0.weight",), bits=2, codebooks=((0.0,),) * 3, zeros=False)])
    pruned = gs.prune(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.zeros(1, 4),), ratio=0.5)
    with pytest.raises(UsageError, match="shares no weights"):
        fine_tune(pruned, batches(4))
