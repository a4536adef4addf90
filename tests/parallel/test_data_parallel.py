"""Several processes compute what one does: parameters, buffers, losses and metrics; uneven parts, empty parts, every option."""

from __future__ import annotations

import warnings

import pytest
import torch
from launching import run
from networks_to_divide import assert_alike, assert_same, images, network, rows, trained
from torch import nn
from torch.utils.data import DataLoader

import gossamer as gs
from gossamer.errors import UsageError
from gossamer.models import mobilenet_v2
from gossamer.parallel import Parallel
from gossamer.sparsity import train_sparse

DDP, FSDP = Parallel(data=2), Parallel(data=2, shard=True)


def both_networks(_rank, parallel):
    wild = mobilenet_v2(num_classes=5, width_mult=0.25, small=True, dropout=0.0).double()  # which multiplies differences, however small
    data = [(x.double(), y) for x, y in DataLoader(images(29), batch_size=8)]
    found = [trained(kind, parallel) for kind in ("mobilenet", "vit")]
    if parallel is None or not parallel.shard:
        found.append(trained("", parallel, model=wild, data=data, val=data, epochs=1, optimizer="adamw"))
    return found


@pytest.mark.parametrize("parallel", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_twenty_steps_equal_one_process_s(tmp_path, parallel):
    torch.manual_seed(0)
    reference = both_networks(0, None)
    found = run(both_networks, 2, tmp_path, parallel)
    for mine, theirs in zip(found[0], reference, strict=False):
        assert_alike(mine, theirs)
    for i in range(len(found[0])):
        assert_same([states[i][0] for states in found])


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_four_processes_equal_one(tmp_path, shard):
    torch.manual_seed(0)
    reference = both_networks(0, None)
    found = run(both_networks, 4, tmp_path, Parallel(data=4, shard=shard))
    for mine, theirs in zip(found[0], reference, strict=False):
        assert_alike(mine, theirs)


class Wanderer(nn.Module):
    """A buffer that follows the inputs by other means than batch norm, a tied weight, and a head that the loss leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.spare, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 4)
        self.two.weight = self.one.weight
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.seen.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.out(torch.tanh(self.two(torch.tanh(self.one(x)))))


OPTIONS = {
    "adamw in float64": {"optimizer": "adamw", "double": True},
    "accumulate": {"accumulate": 3},
    "clip": {"clip": 0.05},
    "ema": {"ema": 0.8},
    "layer decay": {"layer_decay": 0.7},
    "patience": {"patience": 1, "lr": 0.5},
}


def of_other_weights(rank, shard):
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + rank)
    return trained("mlp", Parallel(data=2, shard=shard) if shard is not None else None, model=model, ema=0.9)


@pytest.mark.parametrize("shard", [False, True])
def test_all_start_from_the_first_process_s_weights(tmp_path, shard):
    torch.manual_seed(0)
    reference = of_other_weights(0, None)
    for found in run(of_other_weights, 2, tmp_path, shard):
        assert_alike(found, reference)


def of_other_batches(rank):
    said = []
    data = DataLoader(images(20), batch_size=4, sampler=list(range(20)) if rank == 0 else list(range(19, -1, -1)))
    for batches in (rows()[: 5 + rank], data):
        try:
            gs.fit(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)) if batches is data else network("mlp"), batches, parallel=DDP)
        except UsageError as e:
            said.append(str(e))
    return said


def test_different_batches_are_noticed(tmp_path):
    for said in run(of_other_batches, 2, tmp_path):
        assert len(said) == 2 and all("different batches" in text for text in said)


def with_options(_rank, parallel):
    torch.manual_seed(0)
    out = {}
    for name, given in OPTIONS.items():
        options = dict(given)
        model, data = network("mlp"), rows()
        if options.pop("double", False):
            model, data = model.double(), [(x.double(), y) for x, y in data]
            options["val"] = data[:2]
        out[name] = trained("mlp", parallel, model=model, data=data, **options)
    out["empty parts"] = trained("mlp", parallel, data=rows(9, 3) + rows(1, 1) * 2, model=nn.Sequential(nn.Linear(6, 4)))
    positions = [(x.view(-1, 1, 6), y) for x, y in rows(9, 4)]  # batches of 4, 4 and 1, through a norm
    convolved = nn.Sequential(nn.Conv1d(1, 3, 1), nn.BatchNorm1d(3), nn.Conv1d(3, 2, 3), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(8, 4))
    out["empty parts of norms"] = trained("mlp", parallel, data=positions, model=convolved, val=positions)
    if parallel is None or not parallel.shard:
        out["adafactor"] = trained("mlp", parallel, optimizer="adafactor", model=nn.Linear(6, 4))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="this CPU has no fp16")
            out["fp16"] = trained("mlp", parallel, precision="fp16")
    out["masks"] = trained("mlp", parallel, model=gs.sparsify(network("mlp"), sparsity=0.5))
    out["codebooks"] = trained("mlp", parallel, model=gs.cluster(network("mlp"), bits=2))
    return out


@pytest.mark.parametrize("parallel", [pytest.param(DDP, id="ddp"), pytest.param(FSDP, id="fsdp", marks=pytest.mark.slow)])
def test_options_masks_and_codebooks(tmp_path, parallel):
    reference = with_options(0, None)
    found = run(with_options, 2, tmp_path, parallel)
    tolerances = {"codebooks": 2e-5, "fp16": 2e-3}
    for name in found[0]:
        try:
            assert_alike(found[0][name], reference[name], tolerances.get(name, 1e-5))
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from e
    assert torch.equal(found[0]["masks"][0]["0.weight"] == 0, reference["masks"][0]["0.weight"] == 0)
    assert found[0]["codebooks"][0]["0.weight"].unique().numel() <= 4


def of_copies(_rank, parallel):
    sparse = train_sparse(network("mlp"), rows(), sparsity=0.5, epochs=2, lr=1e-2, optimizer="sgd", parallel=parallel)
    return {
        "penalty": trained("mlp", parallel, penalty="group_lasso", penalty_weight=1e-3),
        "tied": trained("mlp", parallel, model=Wanderer().eval(), epochs=1),
        "schedule": (sparse.model.state_dict(), []),
    }


def test_penalty_ties_unused_heads_and_schedules_of_zeros(tmp_path):
    torch.manual_seed(0)
    reference = of_copies(0, None)
    found = run(of_copies, 2, tmp_path, DDP)
    for name in ("penalty", "schedule"):
        assert_alike(found[0][name], reference[name])
    assert torch.equal(found[0]["schedule"][0]["0.weight"] == 0, reference["schedule"][0]["0.weight"] == 0)
    (mine, _), (other, _), (whole, _) = found[0]["tied"], found[1]["tied"], reference["tied"]
    assert_same([mine, other])  # also the buffer, which saw the first process's inputs alone
    assert torch.equal(mine["one.weight"], mine["two.weight"])
    del mine["seen"], whole["seen"]
    assert_alike((mine, []), (whole, []))


def refusals(_rank):
    said = {}
    for name, parallel, options in (
        ("memory", DDP, {"memory_budget": "1MB"}),
        ("backward", DDP, {"optimizer_in_backward": True}),
        ("adafactor", FSDP, {"optimizer": "adafactor"}),
        ("fp16", FSDP, {"precision": "fp16"}),
        ("penalty", FSDP, {"penalty": "group_lasso"}),
        ("hook", FSDP, {"after_step": lambda model: None}),
        ("processes", Parallel(data=3), {}),
    ):
        try:
            gs.fit(network("mlp"), rows(), parallel=parallel, **options)
        except UsageError as e:
            said[name] = str(e)
    return said


def test_what_does_not_combine_says_so_in_one_line(tmp_path):
    for said in run(refusals, 2, tmp_path):
        assert said.keys() == {"memory", "backward", "adafactor", "fp16", "penalty", "hook", "processes"}
        assert all("\n" not in text for text in said.values())
        assert "torchrun --nproc-per-node 3" in said["processes"]
