"""Networks cut into stages: where they are cut, that stages compute what the network does, and that they train as micro-batches in one process."""

from __future__ import annotations

import copy
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from launching import run
from networks_to_divide import assert_alike, assert_same, furthest, network, trained
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import gossamer as gs
from gossamer.errors import ExportError, NothingToDo, UsageError
from gossamer.models import mobilenet_v2
from gossamer.parallel import Parallel
from gossamer.parallel.pipeline import chain_of, cut_chain
from gossamer.parallel.pipeline.cutting import Balance, Cut
from gossamer.parallel.pipeline.microbatches import check_batches, choose_size
from gossamer.parallel.pipeline.stages import stage_of
from gossamer.sources.batches import outputs

GPIPE, ONE_F_ONE_B = Parallel(pipeline=2, schedule="gpipe", microbatches=4), Parallel(pipeline=2, microbatches=4)


def batches(count=10, size=8, side=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(size, 3, side, side, generator=g).to(dtype), torch.randint(5, (size,), generator=g)) for _ in range(count)]


def micro(data, size):
    return [(a, b) for x, y in data for a, b in zip(x.split(size), y.split(size), strict=True)]


def both_networks(_rank, parallel, accumulate=1, cut=lambda data: data):
    wild = mobilenet_v2(num_classes=5, width_mult=0.25, small=True, dropout=0.0).double()  # which multiplies differences, however small
    data, few = batches(), batches(3, dtype=torch.float64)
    some = {"accumulate": accumulate, "parallel": parallel}
    ragged = [*data[:2], (data[2][0][:4], data[2][1][:4])]  # two micro-batches instead of four
    return [
        trained("mobilenet", data=cut(data), val=data[:2], **some),
        trained("vit", data=cut(data), val=data[:2], **some),
        trained("", model=wild, data=cut(few), val=few, epochs=1, optimizer="adamw", **some),
        trained("vit", data=cut(data[:4]), val=data[:2], clip=0.05, ema=0.8, momentum=0.5, **some),
        *([] if accumulate > 1 else [trained("vit", data=ragged, val=data[:2], **some)]),
    ]


def halves_of_micro_batches(data):
    return micro(data, 2)


def both_schedules(rank, *_):
    torch.manual_seed(0)
    first = both_networks(rank, GPIPE)
    torch.manual_seed(0)
    return first, both_networks(rank, ONE_F_ONE_B)


def test_twenty_steps_equal_micro_batches_in_one_process(tmp_path):
    torch.manual_seed(0)
    reference = both_networks(0, None, 4, halves_of_micro_batches)
    found = run(both_schedules, 2, tmp_path)
    for schedule in (0, 1):
        for mine, theirs in zip(found[0][schedule], reference, strict=False):
            assert_alike(mine, theirs, 1e-6)
        for i in range(5):
            assert_same([states[schedule][i][0] for states in found])


def interleaved(data):
    """Micro-batches of two pipelines that run side by side: the first two samples of each half, then the next two."""
    return [(torch.cat([x[i : i + 2], x[4 + i : 6 + i]]), torch.cat([y[i : i + 2], y[4 + i : 6 + i]])) for x, y in data for i in (0, 2)]


@pytest.mark.slow
def test_data_parallel_pipelines_equal_one_process(tmp_path):
    torch.manual_seed(0)
    reference = both_networks(0, None, 2, interleaved)
    found = run(both_networks, 4, tmp_path, Parallel(data=2, pipeline=2, microbatches=2))
    for mine, theirs in zip(found[0], reference, strict=False):
        assert_alike(mine, theirs)
    for i in range(4):
        assert_same([states[i][0] for states in found])


def test_the_cut_is_the_best_of_all():
    draw = np.random.default_rng(0)
    for _ in range(40):
        n, stages = int(draw.integers(3, 9)), int(draw.integers(1, 4))
        seconds, sending = draw.integers(1, 20, n).astype(float), draw.integers(0, 20, n + 1).astype(float)
        sending[[0, -1]] = 0
        barred = set(draw.choice(np.arange(1, n), size=min(2, n - 1), replace=False).tolist())

        def allowed(firsts, end, barred=barred):
            return ~np.isin(firsts, list(barred)) & (end not in barred)

        def slowest(p, seconds=seconds, sending=sending):
            return max(seconds[i:j].sum() + sending[i] + sending[j] for i, j in pairwise(p)), sum(sending[list(p)])

        every = [(0, *c, n) for c in combinations(range(1, n), stages - 1) if not set(c) & barred]
        if not every:
            with pytest.raises(NothingToDo):
                Balance(seconds, sending, stages, allowed).positions(stages)
            continue
        for most in (stages, stages + 2):
            assert slowest(Balance(seconds, sending, most, allowed).positions(stages))[0] == min(map(slowest, every))[0]


class Skips(nn.Module):
    """A skip over three layers, an input that comes in late, a tied weight, and a buffer that is written into."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, late):
        first = self.a(x)
        y = torch.relu_(self.b(first))
        if self.training:
            self.seen.add_(1)
        y = self.c(y)
        return {"out": self.head(self.d(y) + first * late), "same": first}


def test_what_crosses_a_cut_is_counted_by_hand():
    chain = chain_of(Skips(), (torch.randn(5, 6), torch.randn(5, 1)))
    names = [n.name for n in chain.operations]
    at = names.index("linear_2")  # of c: its input and the skip cross, the late input does not
    tensor = 5 * 6 * 4
    assert sorted(n.name for n in chain.crossing[at]) == ["linear", "relu_"]
    assert chain.crossing_bytes(at) == 2 * tensor
    assert chain.crossing_bytes(names.index("linear_1")) == tensor
    assert chain.crossing_bytes(0) == chain.crossing_bytes(len(names)) == 0
    cut = cut_chain(chain, 3, [1.0] * len(names), 1e9)
    assert cut.stages == 3 and len(cut.crossing_bytes) == 2
    assert cut.crossing_bytes == tuple(chain.crossing_bytes(p) for p in cut.positions[1:-1])


def compared(model, inputs, positions):
    """Outputs, gradients and buffers of a network and of its stages one after another; how far apart they are."""
    whole, parts = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    chain = chain_of(parts, inputs)
    n = len(chain.operations)
    places = (0, *positions(n, chain), n)
    cut = Cut(places, (0.0,) * (len(places) - 1), (), ())
    flat = pytree.tree_leaves(inputs)
    handed = ()
    for i in range(len(places) - 1):
        stage = stage_of(chain, cut, i)
        handed = stage.module(*handed, *(flat[k] for k in stage.needed))
        assert [tuple(t.shape) for t in stage.sent] == [tuple(t.shape) for t in handed]
    out = pytree.tree_unflatten(list(handed), chain.out_spec)
    losses = [sum(t.square().sum() for t in outputs(o) if t.is_floating_point()) for o in (whole(*inputs), out)]
    for loss in losses:
        loss.backward()
    off = [abs(float(losses[0].detach() - losses[1].detach()))]
    mine, theirs = dict(parts.named_parameters()), dict(whole.named_parameters())
    assert mine.keys() == theirs.keys()
    off += [float((mine[n].grad - p.grad).abs().max()) for n, p in theirs.items() if p.grad is not None]
    mine = dict(parts.named_buffers())
    off += [float((mine[n].double() - b.double()).abs().max()) for n, b in whole.named_buffers()]
    return max(off)


WHOLE = {"data_dependent_branch": "data-dependent", "tied_weights": "out.weight is used on both sides"}
"""Those that cannot be cut, and why."""


def test_stages_one_after_another_are_the_network(request, case):
    model, inputs = case
    for m in model.modules():
        if isinstance(m, nn.Dropout | nn.Dropout2d):
            m.p = 0.0
    why = WHOLE.get(request.node.callspec.id)
    if why is not None:
        with pytest.raises((UsageError, ExportError), match=why):
            cut_chain(chain_of(model, inputs), 2, [1.0] * 6, 1e9)
        return
    chain = chain_of(model, inputs)
    two = cut_chain(chain, 2, [1.0] * len(chain.operations), 1e9)
    assert compared(model, inputs, lambda n, c: two.positions[1:-1]) <= 1e-6
    everywhere = compared(model, inputs, lambda n, c: [p for p in range(1, n) if p not in c.barred][:: max(1, n // 6)])
    assert everywhere <= 1e-6  # what is sent is contiguous, and products round otherwise where it was not


def test_skips_late_inputs_and_buffers_are_where_they_belong():
    model, inputs = Skips(), (torch.randn(5, 6), torch.randn(5, 1))
    assert compared(model, inputs, lambda n, c: [p for p in range(1, n) if p not in c.barred]) == 0.0


class Interrupted(Exception):
    """What ends a training in the middle of an epoch."""


class Breaking(list):
    """Batches of which the 9th that is read in all cannot be."""

    def __iter__(self):
        for batch in super().__iter__():
            self.read = getattr(self, "read", 0) + 1
            if self.read > 8:
                raise Interrupted
            yield batch


GOING_ON = {"epochs": 4, "ema": 0.8, "momentum": 0.5}


class Tied(nn.Module):
    """One weight in two roles, next to one another; and a part that is never used."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out, self.spare = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5), nn.Linear(2, 2)
        self.two.weight = self.one.weight
        self.stem, self.norm = nn.Linear(3 * 256, 12), nn.BatchNorm1d(12)

    def forward(self, x):
        return self.out(self.two(torch.tanh(self.one(self.norm(self.stem(x.flatten(1)))))))


def tied(data, **options):
    torch.manual_seed(0)
    return trained("", model=Tied(), data=data, val=batches(2), **(GOING_ON | options))


def resumed(_rank, folder):
    with pytest.raises(Interrupted):
        tied(Breaking(batches(5)), parallel=GPIPE, checkpoint=folder / "of two", checkpoint_every=1)
    return tied(batches(5), parallel=ONE_F_ONE_B, checkpoint=folder / "of two", resume=True)


@pytest.mark.slow
def test_checkpoints_of_a_pipeline_go_on_in_another(tmp_path):
    torch.manual_seed(0)
    reference = tied(micro(batches(5), 2), parallel=None, accumulate=4)
    ours = run(resumed, 2, tmp_path / "processes", tmp_path)
    assert_alike(ours[0], reference)
    assert_same([state for state, _ in ours])


def techniques(_rank, parallel, accumulate=1):
    data = batches(4)
    zeros = gs.sparsify(network("mobilenet"), sparsity=0.5)
    shared = gs.cluster(network("mobilenet"), bits=4)
    options = {"epochs": 1, "lr": 1e-3, "optimizer": "sgd", "parallel": parallel, "accumulate": accumulate}
    data = data if accumulate == 1 else micro(data, 2)
    distilled = gs.distill(network("vit"), network("mobilenet"), data, **options).model
    return [distilled.state_dict(), *(gs.fit(made, data, **options).model.state_dict() for made in (zeros, shared))]


def test_distillation_zeros_and_shared_values_in_stages(tmp_path):
    torch.manual_seed(0)
    reference = techniques(0, None, 4)
    found = run(techniques, 2, tmp_path, GPIPE)[0]
    for mine, theirs in zip(found, reference, strict=True):
        assert furthest(mine, theirs) < 1e-5
    name = "features.5.conv.2.weight"
    assert torch.equal(found[1][name] == 0, reference[1][name] == 0) and bool((found[1][name] == 0).any())
    assert len(found[2][name].unique()) <= 16


def refusals(_rank, *_):
    data, said = batches(2), []
    for options in ({"precision": "bf16"}, {"penalty": "bn_l1"}, {"after_step": print}, {"layer_decay": 0.5}, {"memory_budget": "1GB"}):
        with pytest.raises(UsageError) as e:
            trained("vit", GPIPE, data=data, **options)
        said.append(str(e.value))
    ragged = [*data, (data[0][0][:5], data[0][1][:5])]
    loader = DataLoader(TensorDataset(torch.randn(13, 3, 16, 16), torch.randint(5, (13,))), batch_size=8)
    for given in (ragged, loader):
        with pytest.raises(UsageError, match=r"5 samples are not whole micro-batches of 2 together.*drop_last") as e:
            trained("vit", GPIPE, data=given)
        said.append(str(e.value))
    with pytest.raises(UsageError, match="not 4 equal micro-batches"):
        trained("vit", GPIPE, data=[(x[:6], y[:6]) for x, y in data])

    def unknown():
        yield from ragged

    class Stream:
        def __iter__(self):
            return unknown()

    with pytest.raises(UsageError, match="step 3 of epoch 1: 5 samples are not whole"):  # found on the way, by all at once
        trained("vit", GPIPE, data=Stream())
    return said


def test_what_cannot_be_divided_is_refused_before_anything_waits(tmp_path):
    for said in run(refusals, 2, tmp_path)[0]:
        assert "\n" not in said


def test_sizes_of_micro_batches():
    assert choose_size(32, 2, Parallel(data=2, pipeline=4)) == 2
    assert choose_size(6, 1, Parallel(pipeline=2)) == 2
    assert choose_size(7, 1, Parallel(pipeline=2)) == 7
    check_batches(batches(2), 4, None)
    with pytest.raises(UsageError, match="batch 1 of an epoch"):
        check_batches(batches(2), 3, None)


def test_more_stages_than_there_are_places_say_how_many_there_could_be():
    chain = chain_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), (torch.zeros(2, 4),))
    with pytest.raises(UsageError, match="cannot be cut into 3 stages, 2 at most"):
        cut_chain(chain, 3, [1.0] * 3, 1e9)
