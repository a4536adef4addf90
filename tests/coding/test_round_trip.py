"""Coded weights come back bit for bit, whatever the bits are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.coding import decode, encode
from gossamer.coding.coder import DTYPES
from gossamer.errors import WeightsError


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _check(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    back = decode(encode(state))
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert _bits(back[name]) == _bits(tensor), name
    return back


def _random(dtype: torch.dtype, n: int, rng: np.random.Generator) -> torch.Tensor:
    return _tensor(rng.integers(0, 2 if dtype == torch.bool else 256, (n, dtype.itemsize), dtype=np.uint8), dtype)


def _tensor(raw: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw.tobytes()), dtype=dtype) if raw.size else torch.empty(0, dtype=dtype)


def _drawn(dtype: torch.dtype, n: int, distinct: int, zeros: float, rng: np.random.Generator) -> torch.Tensor:
    """``n`` elements with few distinct bit patterns, some of them zero."""
    raw = rng.integers(0, 2 if dtype == torch.bool else 256, (distinct, dtype.itemsize), dtype=np.uint8)[rng.integers(0, distinct, n)]
    raw[rng.random(n) < zeros] = 0
    return _tensor(raw, dtype)


@pytest.mark.parametrize("name", DTYPES)
def test_random_bits_of_every_dtype(name):
    rng, dtype = np.random.default_rng(0), DTYPES[name]
    state = {f"n{n}": _random(dtype, n, rng) for n in (0, 1, 2, 7, 4095, 4096, 9001)}
    state["few"] = _drawn(dtype, 6000, 9, 0, rng).reshape(60, 100)
    state["sparse"] = _drawn(dtype, 6000, 6000, 0.9, rng).reshape(10, 20, 30)
    state["very sparse"] = _drawn(dtype, 90_000, 90_000, 0.999, rng)
    state["scalar"] = _random(dtype, 1, rng).reshape(())
    _check(state)


def test_special_floats():
    nan32 = torch.tensor([0x7FC00000, 0x7F800001, -1, 0x7FBFFFFF], dtype=torch.int64).to(torch.int32).view(torch.float32)
    special = torch.cat([nan32, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45, -1e-45])])
    large = torch.zeros(5000)
    large[::7] = special.repeat(100)[: len(large[::7])]
    _check({"special": special, "large": large, "half": torch.tensor([0.0, -0.0, float("nan")]).half(), "none": torch.empty(3, 0, 2)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.97, 1.0])
def test_zeros_of_both_signs(dtype, share):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 130, generator=generator, dtype=torch.float64).to(dtype)
    masked = weight * (torch.rand(100, 130, generator=generator) < share)  # as many -0.0 as 0.0
    coded = encode({"w": masked})
    _check({"w": masked, "all minus": torch.full((80, 80), -0.0, dtype=dtype)})
    if share <= 0.05:
        assert coded["coded"].numel() < (0.16 + 1.3 * share * dtype.itemsize) * weight.numel() + 200


def test_many_random_state_dicts():
    rng = np.random.default_rng(1)
    for _ in range(30):
        state = {}
        for i in range(rng.integers(1, 8)):
            shape = tuple(int(n) for n in rng.integers(0, 40, rng.integers(0, 4)))
            dtype = list(DTYPES.values())[rng.integers(len(DTYPES))]
            tensor = _drawn(dtype, int(np.prod(shape)), int(rng.integers(1, 400)), max(0, rng.uniform(-0.5, 1)), rng)
            state[f"layer{i}.ä"] = tensor.reshape(shape)
        _check(state)


@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_codebooks_of_blocks_of_rows_are_found(rows, density):
    """Each block of rows has 16 values of its own: about 4 bits for a weight, not the log2(16 * blocks) that one codebook needs."""
    rng = np.random.default_rng(2)
    books = rng.normal(size=(64 // rows, 16)).astype(np.float32)
    codes = rng.integers(0, 16, (64 // rows, rows * 2000))
    w = np.where(rng.random((64, 2000)) < density, np.take_along_axis(books, codes, 1).reshape(64, 2000), np.float32(0))
    coded = encode({"w": torch.from_numpy(w)})
    _check({"w": torch.from_numpy(w)})
    n = 64 * 2000
    mask = 0 if density == 1 else n / 8
    assert sum(t.numel() for t in coded.values()) < 1.03 * (n * density / 2 + mask + books.size * 4) + 300


@pytest.mark.parametrize("count", [2, 3, 16, 17, 256, 257, 5000])
def test_codes_of_every_width(count):
    rng = np.random.default_rng(3)
    values = rng.normal(size=count).astype(np.float32)
    w = values[rng.integers(0, count, 60_000)]
    coded = encode({"w": torch.from_numpy(w).reshape(200, 300)})
    _check({"w": torch.from_numpy(w).reshape(200, 300)})
    assert coded["coded"].numel() < 60_000 * np.log2(count) / 8 * 1.05 + count * 4 + 200


def test_strided_conjugate_and_trained_tensors_on_their_way_in():
    w = torch.arange(6000.0).reshape(60, 100)
    state = {"t": w.T, "every": w[::2, ::3], "p": torch.nn.Parameter(w), "conj": torch.randn(5, dtype=torch.complex64).conj()}
    assert torch.equal(decode(encode(state))["conj"], state["conj"].resolve_conj())
    assert all(torch.equal(v, state[k]) for k, v in decode(encode(state)).items())


def test_restored_tensors_share_no_memory_and_can_be_written():
    back = _check({f"b{i}": torch.arange(10.0) for i in range(3)} | {"empty": torch.empty(0)})
    back["b0"].fill_(7)
    assert back["b1"].tolist() == list(range(10))


def test_the_same_state_gives_the_same_bytes():
    state = {"a": torch.randn(100, 100), "b": torch.zeros(5)}
    assert all(torch.equal(t, encode(state)[name]) for name, t in encode(state).items())


@pytest.mark.parametrize("state", [{}, {"x": torch.empty(0)}, {"x": torch.tensor(True)}])
def test_next_to_nothing(state):
    _check(state)


def test_what_cannot_be_coded_is_named():
    with pytest.raises(WeightsError, match=r"^w is not a dense tensor"):
        encode({"w": torch.eye(3).to_sparse()})
    with pytest.raises(WeightsError, match="holds tensors under names"):
        encode({"w": 3})
