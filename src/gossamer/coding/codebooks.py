"""Few distinct values: a codebook of bit patterns, for the whole array or for equal blocks of its rows, and codes that point into it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gossamer.coding.streams import Bytes
from gossamer.errors import WeightsError

Patterns = NDArray[np.unsignedinteger]
MOST = 1 << 16
"""Codebooks have at most this many entries."""
SAMPLE = 1 << 16
CELLS = 1 << 24
"""Blocks of rows are looked for where rows times values stay within this."""


@dataclass(frozen=True)
class Codes:
    """``codes`` ``(n,)`` into ``book`` ``(blocks, entries)``, whose rows are padded with zeros; ``used`` entries are not padding."""

    codes: NDArray[np.integer]
    book: Patterns
    used: int

    @property
    def bits(self) -> int:
        """Bits in which one code can be stored: 1, 2, 4, 8 or 16."""
        return next(b for b in (1, 2, 4, 8, 16) if self.book.shape[1] <= 1 << b)


def look_up(values: Patterns, *, rows: int = 1, where: NDArray[np.int64] | None = None, size: int | None = None) -> Codes | None:
    """Codes and codebook of an array of patterns; None where too many are distinct for a codebook to pay.

    Args:
        values: ``(n,)``.
        rows: length of dimension 0 of the tensor of ``size`` elements.
        where: ``(n,)``, the position of each value in the tensor; None where all are here.
    """
    if not values.size:
        return None
    sample = values[:: max(1, values.size // SAMPLE)]
    if np.unique(sample).size > sample.size // 2 and sample.size > 64:
        return None
    book = np.unique(values)
    if book.size > MOST or book.size > max(16, values.size // 2):
        return None
    codes = np.searchsorted(book, values)
    whole = Codes(codes, book[None, :], book.size)
    if rows < 2 or book.size <= 16 or rows * book.size > CELLS:
        return whole
    row = (np.arange(values.size) if where is None else where) // ((size or values.size) // rows)
    present = np.zeros((rows, book.size), bool)
    present[row, codes] = True
    best, least = 1, _estimate(book.size, book.size, values)
    for blocks in (b for b in range(2, rows + 1) if rows % b == 0):
        counts = present.reshape(blocks, rows // blocks, -1).any(1).sum(1)
        bytes_ = _estimate(int(counts.sum()), int(counts.max()), values)
        if bytes_ < least:
            best, least = blocks, bytes_
    if best == 1:
        return whole
    used = np.asarray(present.reshape(best, rows // best, -1).any(1))
    rank = np.cumsum(used, axis=1) - 1
    books = np.zeros((best, int(used.sum(1).max())), book.dtype)
    block, entry = np.nonzero(used)
    books[block, rank[block, entry]] = book[entry]
    return Codes(rank[row // (rows // best), codes], books, block.size)


def gather(book: Patterns, codes: NDArray[np.integer], where: NDArray[np.int64] | None, size: int) -> Patterns:
    """The patterns that codes stand for; the arguments are those of `look_up` and its result."""
    blocks, entries = book.shape
    if codes.size and int(codes.max()) >= entries:
        raise WeightsError("a code points past its codebook")
    if blocks == 1:
        return book[0][codes]
    position = np.arange(codes.size) if where is None else where
    return book[position // (size // blocks), codes]


def pack(codes: NDArray[np.integer], bits: int) -> list[Bytes]:
    """Codes as byte streams: 16 bits as two planes, 8 as they are, fewer packed from the low bits up.

    Example:
        >>> pack(np.array([1, 2, 3]), 4)
        [array([33,  3], dtype=uint8)]
    """
    if bits == 16:
        return [(codes & 255).astype(np.uint8), (codes >> 8).astype(np.uint8)]
    narrow = codes.astype(np.uint8)
    per = 8 // bits
    if per == 1:
        return [narrow]
    lanes = np.concatenate([narrow, np.zeros(-codes.size % per, np.uint8)]).reshape(-1, per)
    packed = lanes[:, 0].copy()
    for i in range(1, per):
        packed |= lanes[:, i] << np.uint8(bits * i)
    return [packed]


def lengths(count: int, bits: int) -> list[int]:
    """Bytes of each stream that `pack` makes of ``count`` codes."""
    if bits not in (1, 2, 4, 8, 16):
        raise WeightsError(f"codes of {bits} bits are not known")
    return [count, count] if bits == 16 else [-(-count * bits // 8)]


def unpack(streams: list[Bytes], bits: int, count: int) -> NDArray[np.integer]:
    """Undo `pack`."""
    if bits == 16:
        return streams[0] | streams[1].astype(np.uint16) << 8
    if bits == 8:
        return streams[0]
    lanes = np.empty((streams[0].size, 8 // bits), np.uint8)
    for i in range(8 // bits):
        lanes[:, i] = (streams[0] >> np.uint8(bits * i)) & np.uint8((1 << bits) - 1)
    return lanes.reshape(-1)[:count]


def _estimate(entries: int, largest: int, values: Patterns) -> float:
    return entries * values.itemsize + values.size * np.log2(max(largest, 2)) / 8
