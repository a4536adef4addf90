"""A state dict as one entropy-coded blob and an index, and back, bit for bit."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from gossamer.coding.codebooks import Patterns
from gossamer.coding.forms import Form, Reader, choose, restore
from gossamer.errors import WeightsError

VERSION = 1
"""Of the coded format."""
SMALL = 4096
"""Tensors with fewer elements share a stream with others of their dtype, unless a form of their own is clearly smaller."""
ALONE = -1
NAMES = (
    "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex64 complex128 "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
).split()
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in NAMES if hasattr(torch, name)}


@dataclass(frozen=True)
class Coded:
    """What `code` makes: the two tensors, and the order-0 entropy bound of the forms it chose, in bytes."""

    tensors: dict[str, Tensor]
    bound: float


def encode(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Code a state dict losslessly into a few tensors of bytes; sparse, shared and integer weights become small.

    Each tensor takes the smallest of several forms: byte planes, or the positions of its non-zero entries with their values, either of
    them as byte planes or as a codebook with codes (Han et al., Deep Compression, 2016). The streams are Huffman-coded by zstandard.

    Examples:
        >>> weight = torch.zeros(64, 64)
        >>> weight[::8] = 0.5
        >>> coded = encode({"weight": weight})
        >>> {name: (t.dtype, t.dim()) for name, t in coded.items()}
        {'coded': (torch.uint8, 1), 'index': (torch.uint8, 1)}
        >>> sum(t.numel() for t in coded.values()) < 64 * 64 * 4 // 50
        True
        >>> bool((decode(coded)["weight"] == weight).all())
        True

    Args:
        state: name -> tensor, of any dense dtype (bool, integers, floats, complex), shape and device.

    Returns:
        ``"coded"`` and ``"index"``, 1-d ``torch.uint8`` tensors on the CPU. The same state dict gives the same bytes.

    Raises:
        WeightsError: an entry is not a dense tensor, or is of a dtype that is not known (a sparse or quantised tensor).
    """
    return code(state).tensors


def decode(coded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Restore a state dict from what `encode` made of it: every tensor bit for bit, with its dtype and shape, in the same order.

    Examples:
        >>> state = {"a": torch.tensor([0.0, -0.0, float("nan")]), "steps": torch.tensor(7), "none": torch.empty(0, 3)}
        >>> back = decode(encode(state))
        >>> [(name, str(t.dtype), tuple(t.shape)) for name, t in back.items()]
        [('a', 'torch.float32', (3,)), ('steps', 'torch.int64', ()), ('none', 'torch.float32', (0, 3))]
        >>> torch.equal(back["a"].view(torch.int32), state["a"].view(torch.int32))
        True

    Args:
        coded: ``"coded"`` and ``"index"``, as `encode` returns them.

    Returns:
        Name -> tensor, on the CPU. No two share memory.

    Raises:
        WeightsError: the bytes are damaged or cut short, or a newer version of the format wrote them.
    """
    if "coded" not in coded or "index" not in coded:
        raise WeightsError("these are not coded weights: 'coded' or 'index' is missing")
    with _one_line_errors():
        index = json.loads(zstandard.ZstdDecompressor().decompress(_bytes(coded["index"], "index")))
        version = index["version"]
    if version != VERSION:
        raise WeightsError(f"format version {version} of coded weights: this gossamer reads version {VERSION}, install a newer one")
    with _one_line_errors():
        return _decode(_bytes(coded["coded"], "coded"), index)


def code(state: Mapping[str, Tensor]) -> Coded:
    """What `encode` does, with the bound of the forms it chose."""
    index: dict[str, Any] = {
        "version": VERSION,
        "crc": 0,
        "dtypes": [],
        "names": list(state),
        "dtype": [],
        "dims": [],
        "sizes": [],
        "group": [],
    }
    numbers: list[int] = []
    blob: list[bytes] = []
    groups: dict[tuple[int, bool], tuple[int, list[Patterns]]] = {}
    bound, crc = 0.0, 0

    def write(form: Form) -> None:
        nonlocal bound
        n, streams = form.write()
        numbers.extend(n)
        blob.extend(streams)
        bound += form.bound

    for name, tensor in state.items():
        kind, array = _dtype_name(name, tensor), patterns(tensor, name)
        crc = zlib.crc32(array.tobytes(), crc)
        if kind not in index["dtypes"]:
            index["dtypes"].append(kind)
        index["dtype"].append(index["dtypes"].index(kind))
        index["dims"].append(tensor.dim())
        index["sizes"].extend(tensor.shape)
        form = choose(array, rows=tensor.shape[0] if tensor.dim() else 1, signed_zero=tensor.is_floating_point()) if array.size else None
        if form is None or (tensor.numel() < SMALL and form.size > 0.8 * array.nbytes):
            key = (index["dtype"][-1], tensor.dim() > 1)
            group, members = groups.setdefault(key, (len(groups), []))
            members.append(array)
            index["group"].append(group)
        else:
            index["group"].append(ALONE)
            write(form)
    for (dtype, _), (_, members) in groups.items():
        write(choose(np.concatenate(members), signed_zero=DTYPES[index["dtypes"][dtype]].is_floating_point))
    index["crc"], index["numbers"] = crc, numbers
    text = json.dumps(index, separators=(",", ":")).encode()
    packed = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(text)
    return Coded({"coded": _tensor(b"".join(blob)), "index": _tensor(packed)}, bound)


def patterns(tensor: Tensor, name: str = "") -> Patterns:
    """The bits of a tensor as a flat array of unsigned integers; those of 16 bytes become two of 8."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise WeightsError(f"{name} is not a dense tensor: only those can be coded")
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(_pattern_dtype(tensor.dtype))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Whatever damaged bytes make go wrong, as a WeightsError."""
    try:
        yield
    except (zstandard.ZstdError, ValueError, LookupError, TypeError, RuntimeError, OverflowError, MemoryError) as e:
        reason = " ".join(str(e).split())[:120]
        raise WeightsError(f"coded weights are damaged{': ' if reason else ''}{reason}") from None


def _decode(blob: memoryview, index: dict[str, Any]) -> dict[str, Tensor]:
    dtypes = [DTYPES[index["dtypes"][i]] for i in index["dtype"]]
    sizes, crc = iter(index["sizes"]), 0
    shapes = [tuple(islice(sizes, n)) for n in index["dims"]]
    reader, arrays = Reader(iter(index["numbers"]), blob), dict[int, Patterns]()
    members: dict[int, list[int]] = {}
    for i, group in enumerate(index["group"]):
        if group == ALONE:
            arrays[i] = restore(reader, _elements(shapes[i], dtypes[i]), _pattern_dtype(dtypes[i]))
        else:
            members.setdefault(group, []).append(i)
    for group in sorted(members):
        ends = np.cumsum([_elements(shapes[i], dtypes[i]) for i in members[group]])
        whole = restore(reader, int(ends[-1]), _pattern_dtype(dtypes[members[group][0]]))
        arrays.update(zip(members[group], np.split(whole, ends[:-1]), strict=True))
    state = {}
    for i, (name, dtype, shape) in enumerate(zip(index["names"], dtypes, shapes, strict=True)):
        data = arrays.pop(i).tobytes()
        crc = zlib.crc32(data, crc)
        state[name] = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
    if crc != index["crc"]:
        raise WeightsError("their checksum does not agree")
    return state


def _elements(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize // _pattern_dtype(dtype).itemsize


def _pattern_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(f"<u{min(dtype.itemsize, 8)}")


def _dtype_name(name: str, tensor: Tensor) -> str:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise WeightsError(f"{name!r} is a {type(tensor).__name__}: a state dict holds tensors under names")
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in DTYPES:
        raise WeightsError(f"{name} has dtype {kind}, which cannot be coded")
    return kind


def _bytes(tensor: Tensor, name: str) -> memoryview:
    if tensor.dtype != torch.uint8:
        raise WeightsError(f"{name!r} is {tensor.dtype}, not bytes")
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).numpy())  # type: ignore[arg-type]


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
