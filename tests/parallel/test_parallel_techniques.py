"""Distillation with adapters and a cache, quantisation-aware training and bf16 in several processes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from launching import run
from networks_to_divide import assert_alike, assert_same, furthest, images, rows
from torch import nn
from torch.utils.data import DataLoader

import gossamer as gs
from gossamer.distillation import Feature
from gossamer.parallel import Parallel

DDP, FSDP = Parallel(data=2), Parallel(data=2, shard=True)


def convolutions(width: int) -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(3, width, 3, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(
        block, nn.Sequential(nn.Conv2d(width, width, 3), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
    )


def taught(_rank, parallel, folder):
    torch.manual_seed(0)
    student, teacher = convolutions(4), convolutions(6)
    options = {"epochs": 2, "lr": 1e-2, "optimizer": "sgd", "parallel": parallel}
    result = gs.distill(student, teacher, DataLoader(images(29), batch_size=6), features=[Feature("0", "0", "fitnet")], **options)
    batches = [x for x, _ in rows(22, 5)]
    cached = gs.distill(nn.Linear(6, 4), nn.Linear(6, 4), batches, alpha=1.0, teacher_cache=folder, **options)
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in result.history]
    return (result.model.state_dict(), history), (cached.model.state_dict(), [])


@pytest.mark.parametrize("parallel", [pytest.param(DDP, id="ddp"), pytest.param(FSDP, id="fsdp", marks=pytest.mark.slow)])
def test_distillation_with_adapters_and_a_cache(tmp_path, parallel):
    reference = taught(0, None, str(tmp_path / "alone"))
    found = run(taught, 2, tmp_path / "processes", parallel, str(tmp_path / "cache"))
    for mine, theirs in zip(found[0], reference, strict=True):
        assert_alike(mine, theirs)
    assert {p.name for p in Path(tmp_path / "cache").iterdir()} == {"process-0", "process-1"}


def rounded(_rank, parallel):
    torch.manual_seed(0)
    data = DataLoader(images(29), batch_size=6)
    options = {"weight_bits": 4, "epochs": 2, "lr": 1e-3, "optimizer": "sgd", "parallel": parallel}
    result = gs.qat(convolutions(4).eval(), data, **options)
    return result.model.state_dict(), result.floating.state_dict()


def test_quantisation_aware_training(tmp_path):
    integers, floating = rounded(0, None)
    found = run(rounded, 2, tmp_path / "ddp", DDP)
    assert furthest(found[0][1], floating) < 1e-4
    assert_same([f[0] for f in found])
    assert list(found[0][0]) == list(integers)


def half(_rank, parallel):
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="this CPU has no bf16")
    data = DataLoader(images(29), batch_size=6)
    result = gs.fit(convolutions(8), data, epochs=2, lr=1e-3, optimizer="sgd", precision="bf16", parallel=parallel, val=data)
    return result.model.state_dict(), list(result.history)


@pytest.mark.filterwarnings("ignore:this CPU has no bf16")
def test_bf16_with_batch_norms_in_fp32(tmp_path):
    whole, history = half(0, None)
    found = run(half, 2, tmp_path, FSDP)
    assert all(t.dtype == whole[n].dtype for n, t in found[0][0].items())
    assert furthest(found[0][0], whole) < 2e-3  # of steps of 1e-3: bf16 has three digits
    assert abs(found[0][1][-1]["val_loss"] - history[-1]["val_loss"]) < 1e-2
    assert_same([f[0] for f in found])
