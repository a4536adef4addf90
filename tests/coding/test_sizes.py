"""Sizes against an entropy bound that NumPy computes here on its own."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from gossamer.coding import encode, storage


def _entropy_bits(symbols: np.ndarray) -> float:
    """Order-0 entropy of all symbols together, in bits."""
    _, counts = np.unique(symbols, return_counts=True)
    return float(sum(-c * math.log2(c / symbols.size) for c in counts.tolist()))


def _sparse_shared(zeros: float, bits: int, shape=(1000, 1000), seed: int = 0) -> np.ndarray:
    """Normal weights, the smallest set to zero, the others snapped to the midpoints of equal intervals: codes of unequal frequency."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape).astype(np.float32)
    kept = np.abs(w) > np.quantile(np.abs(w), zeros)
    step = 2 * np.abs(w).max() / 2**bits
    return np.where(kept, (np.floor(w / step) + np.float32(0.5)) * step, 0).astype(np.float32)


def _coded_bytes(state) -> int:
    return sum(t.numel() for t in encode(state).values())


@pytest.mark.parametrize("zeros", [0.5, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_sparse_shared_weights_come_within_6_percent_of_their_entropy(zeros, bits):
    w = _sparse_shared(zeros, bits)
    values = w[w != 0]
    bound = (_entropy_bits(w != 0) + _entropy_bits(values)) / 8 + np.unique(values).size * 4
    measured = storage({"w": torch.from_numpy(w)})
    assert measured.entropy_bytes == pytest.approx(bound, rel=1e-6, abs=1)
    assert measured.coded_bytes == _coded_bytes({"w": torch.from_numpy(w)})
    assert bound < measured.coded_bytes < 1.06 * bound
    assert measured.dense_bytes == 4_000_000 and measured.numel == 1_000_000 and measured.zeros == int((w == 0).sum())


def test_sparse_integers_come_within_6_percent_of_their_entropy():
    w = np.round(_sparse_shared(0.8, 7) * 20).clip(-127, 127).astype(np.int8)
    values = w[w != 0]
    bound = (_entropy_bits(w != 0) + _entropy_bits(values)) / 8
    measured = storage({"w": torch.from_numpy(w)})
    assert measured.entropy_bytes == pytest.approx(bound, rel=1e-6, abs=1)
    assert measured.coded_bytes < 1.06 * bound


def test_the_bound_of_dense_floats_is_that_of_their_bytes():
    w = np.random.default_rng(0).normal(size=(300, 400)).astype(np.float32)
    planes = w.view(np.uint8).reshape(-1, 4)
    measured = storage({"w": torch.from_numpy(w)})
    assert measured.entropy_bytes == pytest.approx(sum(_entropy_bits(planes[:, i]) for i in range(4)) / 8, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dense_network_does_not_grow(dtype):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32), torch.nn.Conv2d(32, 128, 3), torch.nn.Linear(128, 500))
    measured = storage(net.to(dtype).state_dict())
    assert measured.coded_bytes < measured.dense_bytes


def test_random_bits_grow_by_less_than_1_percent():
    w = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 400_000, dtype=np.uint8)).view(torch.float32)
    assert _coded_bytes({"w": w.reshape(100, 1000)}) < 1.01 * 400_000


def test_many_small_tensors_share_their_overhead():
    state = {f"layers.{i}.{name}": torch.randn(16) for i in range(100) for name in ("weight", "bias", "running_mean", "running_var")}
    state |= {f"layers.{i}.num_batches_tracked": torch.tensor(1000) for i in range(100)}
    assert _coded_bytes(state) < 400 * 16 * 4 + 1000


def test_a_frequent_value_other_than_zero_counts_as_a_mask_too():
    w = np.full((1000, 100), 128, np.uint8)
    rng = np.random.default_rng(0)
    w[rng.random(w.shape) < 0.1] = 7
    assert _coded_bytes({"w": torch.from_numpy(w)}) < 1.06 * _entropy_bits(w) / 8 + 200


def test_repeated_rows_take_less_than_their_bound():
    row = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    measured = storage({"w": row.repeat(200, 1)})
    assert measured.coded_bytes < 6000 < measured.entropy_bytes


def test_zeros_are_counted_over_weights_of_both_signs():
    state = {
        "w": torch.tensor([[0.0, -0.0, 1.0]]),
        "q": torch.tensor([[0, 1]]),
        "bias": torch.zeros(3),
        "m": torch.zeros(2, 2, dtype=torch.bool),
    }
    measured = storage(state)
    assert (measured.zeros, measured.numel, measured.sparsity) == (3, 5, 0.6)
    assert storage({}).sparsity == 0.0


def test_two_million_weights_take_no_more_than_seconds():
    w = torch.from_numpy(_sparse_shared(0.9, 4, shape=(2000, 1000)))
    began = time.process_time()
    encode({"w": w})
    assert time.process_time() - began < 5
