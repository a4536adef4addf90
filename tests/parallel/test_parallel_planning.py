"""What the planner counts is what processes send; its figures follow from the shapes."""

from __future__ import annotations

import json

import pytest
import torch
from launching import run
from networks_to_divide import network, trained
from torch import nn
from torch.nn import functional as F

import gossamer as gs
from gossamer.cli import main
from gossamer.errors import ExportError, NothingToDo, UsageError
from gossamer.parallel import Parallel
from gossamer.parallel.pipeline import chain_of
from gossamer.parallel.planning import Machine, Planner
from gossamer.parallel.planning.costs import flops_of
from gossamer.parallel.planning.layout import Laid
from gossamer.parallel.tensor import split_network
from gossamer.trace import costs

SLOW = Machine(flops=1e9, memory_bandwidth=1e9, bandwidth=1e8, latency_s=1e-4)


def sums(_rank, *_):
    found = []
    for kind in ("mobilenet", "vit"):
        x, y = torch.randn(6, 3, 16, 16), torch.randint(5, (6,))
        split = split_network(network(kind), (x[:2],))
        F.cross_entropy(split.model.train()(x), y).backward()
        found.append((split.ranks.traffic.calls, split.ranks.traffic.bytes))
    return found


def test_sums_over_tensor_ranks_as_they_are_counted(tmp_path):
    found = run(sums, 2, tmp_path)[0]
    for kind, (calls, sent) in zip(("mobilenet", "vit"), found, strict=True):
        laid = Laid.of(network(kind), (torch.randn(2, 3, 16, 16),), 2)
        assert laid.sums.sum() == calls, kind
        assert laid.summed.sum() * 6 / 2 == sent, kind


def messages(rank, *_):
    from torch.distributed.pipelining import PipelineStage

    sent = []
    for name in ("get_fwd_send_ops", "get_bwd_send_ops"):
        plain = getattr(PipelineStage, name)

        def counted(self, index, plain=plain):
            ops = plain(self, index)
            sent.extend(op.tensor.numel() * op.tensor.element_size() for op in ops)
            return ops

        setattr(PipelineStage, name, counted)
    data = [(torch.randn(8, 3, 16, 16), torch.randint(5, (8,))) for _ in range(2)]
    trained("vit", Parallel(pipeline=2, microbatches=4), data=data, val=data, epochs=1)
    return sum(sent), len(sent)


def test_what_a_pipeline_sends_as_it_is_counted(tmp_path):
    (forward, n), (backward, m) = run(messages, 2, tmp_path)
    assert forward == backward and n == m and n % (2 * 4) == 0  # two steps of four micro-batches, of one or more tensors
    laid = Laid.of(network("vit"), (torch.randn(2, 3, 16, 16),), 1)
    assert forward / 2 / 4 in laid.crossing  # where it is cut depends on what is measured
    plan = Planner(network("vit"), (torch.randn(2, 3, 16, 16),)).plan(world=2, batch_size=8, machine=SLOW, microbatches=4)
    split = next(s for s in plan.splits if s.parallel.pipeline == 2)
    assert split.sent_bytes["pipeline"] / 4 in laid.crossing
    assert split.bubble == 1 / 5


def test_operations_are_counted_as_the_trace_counts_them(case):
    model, inputs = case
    try:
        chain = chain_of(model, inputs)
    except ExportError:
        return
    assert sum(flops_of(n) for n in chain.operations) == 2 * costs(model.train(), inputs).macs


def test_weights_are_counted_once_and_scale_with_what_divides_them():
    model = network("mobilenet")
    size = sum(p.numel() * 4 for p in model.parameters())
    planner = Planner(model, (torch.randn(2, 3, 16, 16),))
    whole, half = planner.laid(1), planner.laid(2)
    assert whole.trained_bytes == size
    assert 0.5 < half.trained_bytes / size < 0.65
    plan = planner.plan(world=4, batch_size=32, machine=SLOW)
    of = {(s.parallel.data, s.parallel.tensor, s.parallel.pipeline, s.parallel.shard): s for s in plan.splits}
    assert set(of) == {(4, 1, 1, False), (4, 1, 1, True), (2, 2, 1, False), (2, 1, 2, False), (1, 4, 1, False), (1, 1, 4, False)}
    ddp, fsdp = of[4, 1, 1, False], of[4, 1, 1, True]
    assert ddp.memory.gradients == size and ddp.memory.optimizer == 2 * size
    assert fsdp.memory.gradients == size / 4 and fsdp.memory.total < ddp.memory.total
    assert ddp.sent_bytes["data"] == 2 * 3 / 4 * size and fsdp.sent_bytes["data"] == 3 * 3 / 4 * size
    assert plan.one.memory.activations == 4 * ddp.memory.activations
    assert all(0 < s.efficiency <= 1 for s in plan.splits)
    seconds = plan.one.seconds - (4 + 2 * 2) * size / SLOW.memory_bandwidth
    assert seconds == pytest.approx(whole.work.seconds(SLOW, 32).sum())
    tight = planner.plan(world=4, batch_size=32, machine=Machine(memory_bytes=int(fsdp.memory.total)))
    assert not next(s for s in tight.splits if s.parallel == ddp.parallel).fits
    assert tight.best is not None and tight.best.fits
    assert [s.fits for s in tight.splits] == sorted((s.fits for s in tight.splits), reverse=True)


def test_a_chain_by_hand():
    net = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False))
    machine = Machine(flops=1e9, memory_bandwidth=1e15, bandwidth=1e6, latency_s=0.0, launch_s=0.0)
    plan = Planner(net, (torch.zeros(2, 100),), optimizer="sgd").plan(world=2, batch_size=8, machine=machine, microbatches=4)
    assert plan.one.seconds == pytest.approx(3 * 2 * 2 * 8 * 100 * 100 / 1e9, rel=1e-6)
    pp = next(s for s in plan.splits if s.parallel.pipeline == 2)
    crossing = 2 * 100 * 4
    one_stage = 3 * 2 * 2 * 100 * 100 / 1e9 + 2 * crossing / 1e6
    assert pp.seconds == pytest.approx((4 + 1) * one_stage, rel=1e-6)
    assert pp.sent_bytes == {"data": 0.0, "tensor": 0.0, "pipeline": 4 * crossing}
    tp = next(s for s in plan.splits if s.parallel.tensor == 2)
    summed = 8 * 100 * 4  # the outputs; the gradient of the inputs is not asked for
    assert tp.sent_bytes["tensor"] == summed
    assert tp.seconds == pytest.approx(plan.one.seconds / 2 + summed / 1e6, rel=1e-6)
    ddp = next(s for s in plan.splits if s.parallel.data == 2 and not s.parallel.shard)
    assert ddp.seconds == pytest.approx(plan.one.seconds / 2 + 2 * 100 * 100 * 4 / 1e6, rel=1e-6)
    hidden = Planner(net, (torch.zeros(2, 100),)).plan(world=2, batch_size=8, machine=Machine(flops=1e3, bandwidth=1e9, overlap=1.0))
    assert next(s for s in hidden.splits if s.parallel.data == 2).efficiency == pytest.approx(1.0, abs=1e-3)


def test_what_cannot_be_planned_says_so():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(UsageError, match="adafactor"):
        gs.plan_parallel(net, (torch.zeros(2, 4),), world=2, batch_size=4, optimizer="adafactor")
    with pytest.raises(UsageError, match="world >= 1"):
        gs.plan_parallel(net, (torch.zeros(2, 4),), world=0, batch_size=4)
    with pytest.raises(NothingToDo, match="a batch of 4 is not divided equally among 64"):
        gs.plan_parallel(net, (torch.zeros(2, 4),), world=64, batch_size=4)
    plan = gs.plan_parallel(net, (torch.zeros(2, 4),), world=8, batch_size=8)
    assert any("4 channels that stay together for 8 ranks" in note for note in plan.notes)
    assert any("cut into 8 stages, 2 at most" in note for note in plan.notes)


def test_the_command_prints_a_table_and_json(capsys):
    options = ["train", "gossamer:resnet8", "--plan", "--world", "4", "--device-memory", "1GB", "--bandwidth", "1GB/s", "--flops", "10G"]
    with pytest.raises(SystemExit) as e:
        main(options)
    assert not e.value.code
    shown = capsys.readouterr().out
    assert "fastest that fits is ddp,4" in shown and max(map(len, shown.splitlines())) <= 80
    with pytest.raises(SystemExit):
        main([*options, "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["world"] == 4 and plan["splits"][0]["fits"] and plan["machine"]["flops"] == 1e10
    for bad in (["--bandwidth", "25"], ["--device-memory", "much"], ["--device-memory", "1.2.3GB"], ["--flops", "10"]):
        with pytest.raises(SystemExit) as e:
            main(["train", "gossamer:resnet8", "--plan", *bad])
        assert e.value.code == 2 and bad[0] in capsys.readouterr().err
