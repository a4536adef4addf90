"""Batch norm over processes against batch norm on the whole batch: outputs, gradients, running buffers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from launching import run
from torch import nn
from torch.nn import functional as F

from gossamer.errors import SourceError
from gossamer.parallel.data import SynchronisedNorms
from gossamer.parallel.data.slices import bounds


class Own(nn.BatchNorm2d):
    """A subclass that calls the function itself, as timm's do."""

    def forward(self, x):
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.2, self.eps))


class Graph(nn.Module):
    """The operation itself, as exported graphs have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), nn.Parameter(torch.zeros(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        return torch.ops.aten.batch_norm.default(x, self.weight, self.bias, self.mean, self.var, self.training, 0.1, 1e-5, False)


CASES = {
    "1d": (lambda: nn.BatchNorm1d(3), (7, 3)),
    "1d with positions": (lambda: nn.BatchNorm1d(3), (7, 3, 5)),
    "2d": (lambda: nn.BatchNorm2d(3), (5, 3, 4, 2)),
    "2d, channels last": (lambda: nn.BatchNorm2d(3), (5, 3, 4, 2)),
    "3d": (lambda: nn.BatchNorm3d(3), (5, 3, 2, 2, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (5, 3, 4, 2)),
    "not affine": (lambda: nn.BatchNorm1d(3, affine=False), (7, 3)),
    "no buffers": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (7, 3)),
    "an empty part": (lambda: nn.BatchNorm1d(3), (1, 3, 6)),
    "far from zero": (lambda: nn.BatchNorm1d(3, dtype=torch.float64), (7, 3)),
    "own": (lambda: Own(3), (5, 3, 4, 2)),
    "graph": (Graph, (5, 3, 4, 2)),
}


def whole_batch(name):
    make, shape = CASES[name]
    torch.manual_seed(1)
    x = torch.randn(shape) * 3 + 1
    if name == "far from zero":
        x = x.double() + 1e6
    if "channels last" in name:
        x = x.contiguous(memory_format=torch.channels_last)
    norm = make()
    if getattr(norm, "weight", None) is not None:
        nn.init.normal_(norm.weight)
    return norm, x, torch.randn(shape, dtype=x.dtype)


def results(norm, x, towards, scale=1.0):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = norm(x)
    (out * towards).sum().mul(scale).backward()
    return (
        {"out": out.detach(), "dx": x.grad}
        | {n: p.grad for n, p in norm.named_parameters()}
        | {n: b.clone() for n, b in norm.named_buffers()}
    )


def parts(rank, world):
    found = {}
    group = dist.group.WORLD
    for name in CASES:
        norm, x, towards = whole_batch(name)
        first, end = bounds(len(x), rank, world)
        cut = slice(first, end) if end > first else slice(0, 1)
        for _ in range(2):
            norm.zero_grad()
            with SynchronisedNorms(group, counts=end > first):
                found[name] = results(norm, x[cut], towards[cut], float(end > first))
        found[name] |= {"n": end - first}
        copied = copy.deepcopy(norm).eval()
        with SynchronisedNorms(group):
            assert torch.equal(copied(x), copied(x))  # no statistics of other processes in eval mode
    try:
        with SynchronisedNorms(group, counts=rank == 0):
            nn.BatchNorm1d(2)(torch.ones(1, 2))
    except SourceError as e:
        found["one value"] = str(e)
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_outputs_gradients_and_buffers_are_those_of_the_whole_batch(tmp_path, world):
    found = run(parts, world, tmp_path, world)
    for name in CASES:
        norm, x, towards = whole_batch(name)
        for _ in range(2):
            norm.zero_grad()
            expected = results(norm, x, towards)
        own = [f[name] for f in found]
        for key, value in expected.items():
            if key == "dx":
                assert all(not part[key][part["n"] :].any() for part in own)  # a sample that only stands in has no gradient
            if key in ("out", "dx"):
                joined = torch.cat([part[key][: part["n"]] for part in own])
            elif key in dict(norm.named_parameters()):
                joined = torch.stack([part[key] for part in own]).sum(0)
            else:
                joined = own[0][key]
                assert all(torch.equal(joined, part[key]) for part in own), f"{name}: {key} differs between processes"
            torch.testing.assert_close(joined, value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name, k=key: f"{n}, {k}: {m}")
    assert all("larger batches" in f["one value"] for f in found)
