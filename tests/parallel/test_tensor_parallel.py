"""Networks whose channels are shared out among processes compute, train and resume as whole ones do."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from launching import run
from networks_to_divide import assert_alike, assert_same, furthest, images, network, rows, trained
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

import gossamer as gs
from gossamer.errors import NothingToDo, UsageError
from gossamer.parallel import Parallel
from gossamer.parallel.tensor import split_network
from gossamer.parallel.tensor.choice import choose
from gossamer.sources.batches import outputs
from gossamer.trace import trace

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "networks.py"
TP = Parallel(tensor=2)


def both_networks(_rank, parallel):
    x, y = images(29).tensors
    rows64 = list(zip(x.flatten(1)[:, :6].double().split(8), (y % 4).split(8), strict=True))
    return [trained(kind, parallel) for kind in ("mobilenet", "vit")] + [
        trained("mlp", parallel, model=network("mlp").double(), data=rows64, val=rows64, optimizer="adamw", accumulate=2),
        trained("mlp", parallel, clip=0.05, ema=0.8),
    ]


def test_twenty_steps_equal_one_process_s_when_layers_are_shared(tmp_path):
    torch.manual_seed(0)
    reference = both_networks(0, None)
    found = run(both_networks, 2, tmp_path, TP)
    for mine, theirs in zip(found[0], reference, strict=True):
        assert_alike(mine, theirs)
    for i in range(4):
        assert_same([states[i][0] for states in found])


@pytest.mark.slow
def test_data_parallel_around_tensor_parallel_equals_one_process(tmp_path):
    torch.manual_seed(0)
    reference = both_networks(0, None)
    found = run(both_networks, 4, tmp_path, Parallel(data=2, tensor=2))
    for mine, theirs in zip(found[0], reference, strict=True):
        assert_alike(mine, theirs)


class Interrupted(Exception):
    """What ends a training in the middle of an epoch."""


class Breaking(list):
    """Batches of which the 16th that is read in all cannot be."""

    def __iter__(self):
        for batch in super().__iter__():
            self.read = getattr(self, "read", 0) + 1
            if self.read > 15:
                raise Interrupted
            yield batch


GOING_ON = {"epochs": 4, "ema": 0.8, "momentum": 0.5}


def resumed(_rank, folder):
    """A checkpoint of one process goes on in two, and theirs."""
    with pytest.raises(Interrupted):
        trained("mlp", TP, data=Breaking(rows()), checkpoint=folder / "of two", checkpoint_every=1, **GOING_ON)
    return [trained("mlp", TP, checkpoint=folder / name, resume=True, **GOING_ON) for name in ("of one", "of two")]


def test_checkpoints_go_on_in_any_number_of_processes(tmp_path):
    torch.manual_seed(0)
    reference = trained("mlp", None, **GOING_ON)
    with pytest.raises(Interrupted):
        trained("mlp", None, data=Breaking(rows()), checkpoint=tmp_path / "of one", checkpoint_every=1, **GOING_ON)
    one, two = run(resumed, 2, tmp_path / "processes", tmp_path)[0]
    assert_alike(one, reference)
    assert_alike(two, reference)
    assert_alike(trained("mlp", None, checkpoint=tmp_path / "of two", resume=True, **GOING_ON), reference)


def cases():
    spec = importlib.util.spec_from_file_location("networks", CASES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for make in module.ALL:
        torch.manual_seed(0)
        model, inputs = make()
        yield make.__name__, model.double(), tuple(t.double() if t.is_floating_point() else t for t in inputs)


def loss_of(model, inputs):
    return sum(t.square().mean() for t in outputs(model(*inputs)) if t.is_floating_point())


def every_case(rank, *_):
    found = {}
    for name, model, inputs in cases():
        for m in model.modules():
            if isinstance(m, nn.Dropout | nn.Dropout2d):
                m.p = 0.0
        try:
            split = split_network(model, inputs)
        except NothingToDo as e:
            found[name] = str(e)
            continue
        whole, share = copy.deepcopy(model).train(), split.model.train()
        for m in (whole, share):
            optimizer = torch.optim.SGD(m.parameters(), 0.01, momentum=0.9)
            for step in range(5):
                optimizer.zero_grad()
                loss_of(m, tuple(t.roll(step, 0) * (1 + 0.1 * step) if t.is_floating_point() else t for t in inputs)).backward()
                optimizer.step()
        after = split.state_dict()
        off = max(float((after[n].double() - t.double()).abs().max()) for n, t in whole.state_dict().items())
        found[name] = off, [u.name for u in split.units], [list(u.ends) for u in split.units], split.ranks.traffic.calls, dict(split.whole)
    return found


@pytest.mark.skipif(not CASES.is_file(), reason="the networks that break other tools are not beside this checkout")
def test_every_network_trains_as_the_whole_or_says_why_not(tmp_path):
    ours, theirs = run(every_case, 2, tmp_path)
    assert ours == theirs
    whole = {name: found for name, found in ours.items() if isinstance(found, str)}
    assert list(whole) == ["data_dependent_branch"] and "makes what it uses" in whole["data_dependent_branch"]
    for name, found in ours.items():
        if name not in whole:
            off, units, ends, _, reasons = found
            assert off < 1e-9, name
            assert units and all(ends) and all(reasons.values()), name
    assert ours["grouped_query_attention"][1] == ["q", "fc1"]
    assert ours["einsum_attention"][1] == ["qkv"]
    assert ours["grouped_convolution"][1] == ["a.0", "c.0"]


class Squeezed(nn.Module):
    """An inverted residual with squeeze-and-excite, a learned slope that all channels share, and dropout inside."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand, self.bn = nn.Conv2d(8, 21, 1, bias=False), nn.BatchNorm2d(21)
        self.act, self.depthwise = nn.PReLU(), nn.Conv2d(21, 21, 3, padding=1, groups=21)
        self.fc1, self.fc2 = nn.Conv2d(21, 5, 1), nn.Conv2d(5, 21, 1)
        self.drop, self.project, self.out = nn.Dropout(0.0), nn.Conv2d(21, 8, 1), nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.depthwise(self.act(self.bn(self.expand(x))))
        y = y * torch.sigmoid(self.fc2(torch.relu(self.fc1(y.mean((2, 3), keepdim=True)))))
        return self.head(self.out(x + self.project(self.drop(y))).mean((2, 3)))


def squeezed(rank, *_):
    torch.manual_seed(0)
    model = Squeezed()
    x = torch.randn(2, 3, 6, 6)
    split = split_network(model, (x,))
    model.out.p = split.model.out.p = 0.0
    out, expected = split.model.train()(x), model.train()(x)
    out.square().sum().backward()
    expected.square().sum().backward()
    own = split.layout.share({n: p.grad for n, p in model.named_parameters()}, rank)
    off = max(float((p.grad - own[n]).abs().max() / own[n].abs().max().clamp(min=1e-6)) for n, p in split.model.named_parameters())
    calls, sent = split.ranks.traffic.calls, split.ranks.traffic.bytes
    # now with dropout: inside a split part ranks draw their own numbers, after it the same, though they have 11 and 10 channels
    torch.manual_seed(0)
    again = Squeezed()
    again.drop.p = 0.5
    again, kept = split_network(again, (x,)).model.train(), []
    again.drop.register_forward_hook(lambda m, a, o: kept.append((o != 0)[:, :10]))
    torch.manual_seed(1)
    return {
        "off": off,
        "outputs": float((out - expected).detach().abs().max()),
        "units": [(u.begins, u.ends) for u in split.units],
        "partial": split.partial,
        "channels": split.model.bn.num_features,
        "traffic": (calls, sent),
        "random": again(x).detach(),
        "kept": kept[0],
    }


def test_one_sum_where_a_part_ends_and_what_is_small_inside_it(tmp_path):
    found = run(squeezed, 2, tmp_path)
    for one in found:
        assert one["off"] < 1e-4 and one["outputs"] < 1e-5
        assert one["units"] == [(("expand", "fc2"), ("fc1", "project"))]
        assert one["partial"] == ("act.weight",)
    assert [one["channels"] for one in found] == [11, 10]
    image, small, slope = 2 * 8 * 6 * 6 * 4, 2 * 5 * 4, 4
    assert found[0]["traffic"] == (5, 2 * image + 2 * small + slope)  # forward and backward: the image and the squeezed vector; the slope
    assert torch.equal(found[0]["random"], found[1]["random"])
    assert not torch.equal(found[0]["kept"], found[1]["kept"])


def mlp_by_dtensor(rank, *_):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.randn(5, 6)
    split = split_network(net, (x,))
    theirs = parallelize_module(copy.deepcopy(net), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for m in (split.model, theirs):
        m(x).square().sum().backward()
    pairs = zip(split.model.parameters(), theirs.parameters(), strict=True)
    off = max(float((p.grad - q.grad.to_local()).abs().max()) for p, q in pairs)
    conv = nn.Conv2d(4, 4, 3)
    conv.weight = nn.Parameter(distribute_tensor(conv.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)]))
    with pytest.raises(UsageError, match=r"0\.weight is split by DTensor"):
        split_network(nn.Sequential(conv), (torch.zeros(1, 4, 4, 4),))
    return float((split.model(x) - theirs(x)).detach().abs().max()), off


def test_linear_layers_as_dtensor_splits_them_and_its_convolutions_refused(tmp_path):
    for outputs_off, gradients_off in run(mlp_by_dtensor, 2, tmp_path):
        assert outputs_off < 1e-6 and gradients_off < 1e-5


def test_of_a_mobilenet_each_block_is_split_inside():
    net = network("mobilenet").eval()
    choice = choose(net, trace(net, (torch.zeros(1, 3, 16, 16),)), 2)
    blocks = [u for u in choice.units if u.name.startswith("features.") and len(u.begins) == 1 and len(u.ends) == 1]
    assert len(blocks) >= 16
    assert all(u.begins[0].rsplit(".", 3)[0] == u.ends[0].rsplit(".", 2)[0] for u in blocks[1:16])


def techniques(_rank, parallel):
    data = list(DataLoader(images(32), batch_size=8))
    zeros = gs.sparsify(network("mobilenet"), sparsity=0.5)
    options = {"epochs": 1, "lr": 1e-3, "optimizer": "sgd", "parallel": parallel}
    distilled = gs.distill(network("vit"), network("mobilenet"), data, **options).model
    return [distilled.state_dict(), gs.fit(zeros, data, **options).model.state_dict()]


def assert_techniques(found):
    reference = techniques(0, None)
    for mine, theirs in zip(found, reference, strict=True):
        assert furthest(mine, theirs) < 1e-5
    weights = [n for n in reference[1] if n.endswith("conv.2.weight")]
    assert weights and all(torch.equal(found[1][n] == 0, reference[1][n] == 0) for n in weights)
    assert any(bool((found[1][n] == 0).any()) for n in weights)


def test_distillation_and_zeros_that_stay(tmp_path):
    torch.manual_seed(0)
    assert_techniques(run(techniques, 2, tmp_path, TP)[0])


def refusals(rank, *_):
    from networks_to_divide import trained as fit

    said = []
    for options in (
        {"optimizer": "adafactor"},
        {"penalty": "bn_l1"},
        {"after_step": print},
        {"precision": "fp16"},
        {"memory_budget": "1GB"},
    ):
        with pytest.raises(UsageError) as e:
            fit("mlp", TP, **options)
        said.append(str(e.value))
    with pytest.raises(UsageError, match="share values of a codebook") as e:
        trained("", TP, model=gs.cluster(network("mlp"), bits=2), data=rows())
    said.append(str(e.value))
    with pytest.raises(NothingToDo, match="no channels can be split"):
        split_network(nn.Linear(4, 2), (torch.zeros(1, 4),))
    return said


def test_what_does_not_combine_says_so(tmp_path):
    for said in run(refusals, 2, tmp_path)[0]:
        assert "\n" not in said and ("parallel" in said)
