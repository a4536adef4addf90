"""Few distinct values: a codebook of bit patterns, for the whole array or for equal blocks of its rows, and codes that point into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.coding.streams import Bytes
from gossamer.errors import WeightsError

Patterns = NDArray[np.unsignedinteger]
MOST = 1 << 16
"""Codebooks have at most this many entries."""
SAMPLE = 1 << 16
CELLS = 1 << 24
"""Which rows use which values is a table up to this size, and a sort above it."""


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


def look_up(values: Patterns, *, rows: int = 1, where: NDArray[np.int64] | None = None, size: int | None = None) -> list[Codes]:
    """Codes and codebooks of an array of patterns: none where too many are distinct, one, or one more with a codebook for each block of rows.

    Args:
        values: ``(n,)``.
        rows: length of dimension 0 of the tensor of ``size`` elements.
        where: ``(n,)``, the position of each value in the tensor; None where all are here.
    """
    if not values.size:
        return []
    sample = _distinct(values[:: max(1, values.size // SAMPLE)])
    if sample.size > max(64, 0.7 * min(values.size, SAMPLE)):
        return []
    book = _distinct(values)
    if book.size > min(MOST, max(16, values.size // 2)) or (values.itemsize == 1 and book.size > 16):
        return []
    codes = np.searchsorted(book, values)
    whole = Codes(codes, book[None, :], book.size)
    if rows < 2 or book.size <= 16:
        return [whole]
    row = (np.arange(values.size) if where is None else where) // ((size or values.size) // rows)
    blocked = _by_blocks(codes, row, rows, book)
    return [whole, blocked] if blocked else [whole]


def _by_blocks(codes: NDArray[np.int64], row: NDArray[np.int64], rows: int, book: Patterns) -> Codes | None:
    """Codes into a codebook for each equal block of rows, if blocks of some size look smaller than one codebook for all."""
    entries = book.size
    if rows * entries <= CELLS:
        present = np.zeros(rows * entries, bool)
        present[row * entries + codes] = True
        cells = np.flatnonzero(present)
    else:
        cells = _distinct(row * entries + codes)
    best, least = 1, entries * book.itemsize + codes.size * np.log2(entries) / 8
    for blocks in (b for b in range(2, rows + 1) if rows % b == 0):
        used = _distinct(cells // entries // (rows // blocks) * entries + cells % entries)
        most = np.bincount(used // entries).max()
        size = used.size * book.itemsize + codes.size * np.log2(max(most, 2)) / 8
        if size < least:
            best, least = blocks, size
    if best == 1:
        return None
    used = _distinct(cells // entries // (rows // best) * entries + cells % entries)
    per_block = np.bincount(used // entries, minlength=best)
    first = np.cumsum(per_block) - per_block
    block = row // (rows // best)
    books = np.zeros((best, int(per_block.max())), book.dtype)
    books[used // entries, np.arange(used.size) - first[used // entries]] = book[used % entries]
    cell = block * entries + codes
    if best * entries <= CELLS:
        place = np.zeros(best * entries, np.int32)
        place[used] = np.arange(used.size)
        return Codes(place[cell] - first[block], books, used.size)
    return Codes(np.searchsorted(used, cell) - first[block], books, used.size)


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

    Examples:
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


def _distinct(values: NDArray[Any]) -> NDArray[Any]:
    """Sorted distinct values: by a sort, which on values that are nearly all distinct is much faster than the hashing of `numpy.unique`."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]
