"""The forms in which one array of bit patterns can be stored, the choice of the smallest, and the way back.

An array is written as [positions] + values. Positions say where it differs from its default pattern (zero, nearly always); values are the
patterns at those positions, or everywhere. Every form is a list of numbers for the index and a list of byte streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gossamer.coding.codebooks import Patterns, gather, lengths, look_up, pack, unpack
from gossamer.coding.streams import Bytes, cost, entropy, expand, squeeze
from gossamer.errors import WeightsError

NOWHERE, BITMASK, SHORT_GAPS, LONG_GAPS = range(4)
"""Positions: none (every element is stored), a bit for each element, gaps as bytes with 255 for "255 more", gaps as byte planes."""
SIGNS = 4
"""Added to the kind of positions where zeros have signs: one bit for each element that is not stored."""
PLANES, JOINED, CODEBOOK = range(3)
"""Values: the i-th bytes of all elements as stream i, the same in one stream, or codes into codebooks."""
JOIN = 1 << 14
"""Up to this many bytes, planes in one stream are tried too: they save the overhead of several."""
NUMBER = 2
"""What a number takes in the index, about, in bytes."""


@dataclass
class Form:
    """One array as numbers and streams.

    Attributes:
        kind: of positions or values.
        numbers: what the index says besides.
        streams: bytes to be coded.
        symbols: arrays of small integers whose order-0 entropies bound the streams.
        fixed: bytes to be added to that bound: codebooks as they are, positions.
    """

    kind: int
    numbers: list[int] = field(default_factory=list)
    streams: list[Bytes] = field(default_factory=list)
    symbols: list[NDArray[np.integer]] = field(default_factory=list)
    fixed: float = 0.0

    @cached_property
    def size(self) -> int:
        """About what the form takes, in bytes."""
        return sum(map(cost, self.streams)) + NUMBER * (len(self.numbers) + len(self.streams) + 1)

    def __add__(self, other: Form) -> Form:
        return Form(
            self.kind,
            [other.kind, *self.numbers, *other.numbers],
            self.streams + other.streams,
            self.symbols + other.symbols,
            self.fixed + other.fixed,
        )

    @property
    def bound(self) -> float:
        """Order-0 entropy of its symbols and positions, plus raw codebooks, in bytes."""
        return sum(map(entropy, self.symbols)) + self.fixed

    def write(self) -> tuple[list[int], list[bytes]]:
        """All numbers for the index, lengths of the coded streams last, and the coded streams."""
        coded = [squeeze(s) for s in self.streams]
        return [self.kind, *self.numbers, *map(len, coded)], coded


def choose(array: Patterns, *, rows: int = 1, signed_zero: bool = False) -> Form:
    """The smallest form of an array of bit patterns.

    Args:
        array: ``(n,)``, unsigned integers.
        rows: length of dimension 0 of the tensor it is from; codebooks may belong to equal blocks of rows.
        signed_zero: the patterns are floats, so that the highest bit alone is a zero too.
    """
    default = _default(array)
    off = array != default
    minus = np.zeros(0, bool)
    if signed_zero and default == 0:
        minus = array == array.dtype.type(_minus_zero(array.dtype))
        off &= ~minus
    where = np.flatnonzero(off)
    dense = Form(NOWHERE) + _values(array, rows=rows) if where.size > 0.5 * array.size or not array.size else None
    if dense is not None and where.size > 0.98 * array.size:
        return dense
    positions = _positions(off, where)
    positions.numbers = [default, where.size, *positions.numbers]
    if minus.any():
        signs = minus[~off]
        positions.kind += SIGNS
        positions.streams.append(np.packbits(signs))
        positions.symbols.append(signs.view(np.uint8))
    sparse = positions + _values(array[where], rows=rows, where=where, size=array.size)
    return sparse if dense is None else min(dense, sparse, key=lambda form: form.size)


class Reader:
    """Takes numbers from an index and streams from the blob beside it, in the order in which `Form.write` gave them."""

    def __init__(self, numbers: Iterator[int], blob: memoryview) -> None:
        self.numbers, self.blob, self.offset = numbers, blob, 0

    def number(self) -> int:
        number = next(self.numbers, None)
        if number is None:
            raise WeightsError("its index ends too early")
        return number

    def stream(self, size: int) -> Bytes:
        """The next stream, ``size`` bytes long when decoded."""
        length = self.number()
        part = self.blob[self.offset : self.offset + length]
        if length < 0 or len(part) != length:
            raise WeightsError("it ends in the middle of a stream")
        self.offset += length
        return expand(part, size)


def restore(reader: Reader, size: int, dtype: np.dtype[np.unsignedinteger]) -> Patterns:
    """The array of ``size`` patterns that `choose` took."""
    place, kind = reader.number(), reader.number()
    signed, place = bool(place & SIGNS), place & ~SIGNS
    default, count = (reader.number(), reader.number()) if place else (0, size)
    extra = reader.number() if place in (SHORT_GAPS, LONG_GAPS) else 0
    blocks, entries, bits = (reader.number(), reader.number(), reader.number()) if kind == CODEBOOK else (1, 0, 8)
    if not (NOWHERE <= place <= LONG_GAPS and PLANES <= kind <= CODEBOOK and 0 <= count <= size):
        raise WeightsError(f"an array in form {place}, {kind} with {count} of {size} values is not known")
    where = _restore_positions(reader, place, count, extra, size) if place else None
    signs = np.unpackbits(reader.stream(-(-(size - count) // 8)), count=size - count).view(bool) if signed else None
    if kind == CODEBOOK:
        book = _from_planes(reader.stream(blocks * entries * dtype.itemsize), dtype).reshape(blocks, entries)
        values = gather(book, unpack([reader.stream(n) for n in lengths(count, bits)], bits, count), where, size)
    elif kind == JOINED:
        values = _from_planes(reader.stream(count * dtype.itemsize), dtype)
    else:
        values = _from_planes(np.concatenate([reader.stream(count) for _ in range(dtype.itemsize)]), dtype)
    if where is None:
        return values
    array = np.full(size, default, dtype)
    if signs is not None:
        rest = np.ones(size, bool)
        rest[where] = False
        array[np.flatnonzero(rest)[signs]] = _minus_zero(dtype)
    array[where] = values
    return array


def _default(array: Patterns) -> int:
    """The pattern that positions leave out: zero, or one that is more frequent in a sample than all others together."""
    if not array.size or np.count_nonzero(array) < 0.5 * array.size:
        return 0
    patterns, counts = np.unique(array[:: max(1, array.size // 4096)], return_counts=True)
    return int(patterns[counts.argmax()]) if counts.max() > 0.5 * counts.sum() else 0


def _minus_zero(dtype: np.dtype[np.unsignedinteger]) -> int:
    return 1 << (8 * dtype.itemsize - 1)


def _positions(off: NDArray[np.bool_], where: NDArray[np.int64]) -> Form:
    share = where.size / off.size if off.size else 0.0
    uncertain = sum(-p * np.log2(p) for p in (share, 1 - share) if p) * off.size / 8
    forms = [Form(BITMASK, streams=[np.packbits(off)], fixed=uncertain)]
    gaps = np.diff(where, prepend=-1) - 1
    if share < 0.25:
        more = gaps // 255
        tokens = np.full(int(more.sum()) + gaps.size, 255, np.uint8)
        tokens[np.cumsum(more + 1) - 1] = gaps - 255 * more
        forms.append(Form(SHORT_GAPS, [tokens.size], [tokens], fixed=uncertain))
    if share < 0.02:
        width = -(-int(gaps.max(initial=0)).bit_length() // 8)
        forms.append(Form(LONG_GAPS, [width], [(gaps >> (8 * i)).astype(np.uint8) for i in range(width)], fixed=uncertain))
    return min(forms, key=lambda form: form.size)


def _restore_positions(reader: Reader, place: int, count: int, extra: int, size: int) -> NDArray[np.int64]:
    if place == BITMASK:
        where = np.flatnonzero(np.unpackbits(reader.stream(-(-size // 8)), count=size))
    elif place == SHORT_GAPS:
        tokens = reader.stream(extra)
        ends = np.flatnonzero(tokens < 255)
        where = np.cumsum(tokens, dtype=np.int64)[ends] + np.arange(ends.size)
    else:
        gaps = np.zeros(count, np.int64)
        for i in range(extra):
            gaps |= reader.stream(count).astype(np.int64) << (8 * i)
        where = np.cumsum(gaps + 1) - 1
    if where.size != count or (count and int(where[-1]) >= size):
        raise WeightsError("the positions of an array's values do not fit its size")
    return where


def _values(values: Patterns, *, rows: int, where: NDArray[np.int64] | None = None, size: int | None = None) -> Form:
    planes = _planes(values)
    forms = [Form(PLANES, streams=list(planes), symbols=list(planes))]
    if values.nbytes <= JOIN and values.itemsize > 1:
        forms.append(Form(JOINED, streams=[planes.reshape(-1)], symbols=list(planes)))
    for found in look_up(values, rows=rows, where=where, size=size):
        for bits in sorted({found.bits, max(found.bits, 8)}):
            numbers = [*found.book.shape, bits]
            streams = [_planes(found.book.reshape(-1)).reshape(-1), *pack(found.codes, bits)]
            forms.append(Form(CODEBOOK, numbers, streams, [found.codes], float(found.used * values.itemsize)))
    return min(forms, key=lambda form: form.size)


def _planes(values: Patterns) -> NDArray[np.uint8]:
    """``(itemsize, n)``: the i-th bytes of all elements, low ones first."""
    return np.ascontiguousarray(values.view(np.uint8).reshape(values.size, values.itemsize).T)


def _from_planes(planes: Bytes, dtype: np.dtype[np.unsignedinteger]) -> Patterns:
    return np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).reshape(-1).view(dtype)
