"""Where zeros are faster: measured break-even, the command, and 2:4 on a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.cli import main
from gossamer.errors import NothingToDo, UsageError
from gossamer.profiling import SparseKernels, SparseTiming, sparse_kernels
from gossamer.sparsity import semi_structured


def test_break_even_is_the_sparsity_from_which_all_higher_ones_win():
    def row(s, ratio):
        return SparseTiming(8, 8, 1, s, ratio, ratio, ratio)

    timed = SparseKernels((row(0.5, 0.9), row(0.8, 1.1), row(0.9, 0.8), row(0.99, 0.2)), threads=1)
    assert timed.break_even(8, 8, 1) == 0.9
    assert SparseKernels((row(0.5, 0.2), row(0.99, 1.2)), threads=1).break_even(8, 8, 1) is None
    assert "faster from 90% zeros on" in str(timed)


def test_nearly_empty_matrices_are_faster_and_dense_ones_are_not():
    timed = sparse_kernels([(1024, 1024)], batches=[1], sparsities=[0.1, 0.999], seconds=0.3)
    dense, empty = timed.rows
    assert dense.ratio > 1 > empty.ratio
    assert timed.break_even(1024, 1024, 1) == 0.999


def test_a_network_brings_its_shapes():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 2))
    timed = sparse_kernels(net, batches=[1], sparsities=[0.5], seconds=0.01)
    assert {(r.outputs, r.inputs) for r in timed.rows} == {(16, 8), (8, 16), (2, 16)}
    with pytest.raises(UsageError, match="no linear layer"):
        sparse_kernels(nn.Conv2d(1, 1, 1))
    with pytest.raises(UsageError, match="lie in"):
        sparse_kernels([(4, 4)], sparsities=[1.0])


def test_the_command_prints_both(capsys):
    with pytest.raises(SystemExit) as e:
        main(["bench", "gossamer:resnet8", "--input", "1,3,8,8", "--seconds", "0.1", "--sparse-kernels", "--json"])
    assert not e.value.code
    said = json.loads(capsys.readouterr().out)
    assert said["benchmark"]["rows"]
    assert {r["sparsity"] for r in said["sparse_kernels"]["rows"]} >= {0.5, 0.99}


def test_2_4_kernels_are_refused_where_there_is_no_such_gpu():
    with pytest.raises(UsageError, match="CUDA devices"):
        semi_structured(nn.Linear(64, 64))


@pytest.mark.gpu
def test_2_4_kernels_compute_the_same():
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128)).cuda().half().eval()
    sparse = gs.sparsify(net, pattern="2:4").model
    fast = semi_structured(sparse)
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), sparse(x), rtol=1e-2, atol=1e-2)
    assert type(fast[0].weight.data).__name__.startswith("SparseSemiStructured") or type(fast[0].weight).__name__ != "Parameter"
    with pytest.raises(NothingToDo):
        semi_structured(net)
