"""One stream of bytes, entropy-coded: Huffman codes and, where the bytes repeat, matches; both as zstandard frames without magic bytes."""

from __future__ import annotations

import numpy as np
import zstandard
from numpy.typing import NDArray

from gossamer.errors import WeightsError

Bytes = NDArray[np.uint8]
BARE = {
    "format": zstandard.FORMAT_ZSTD1_MAGICLESS,
    "write_content_size": False,
    "write_checksum": False,
    "write_dict_id": False,
}
HUFFMAN = {
    "strategy": zstandard.STRATEGY_FAST,
    "window_log": 17,
    "hash_log": 6,
    "chain_log": 6,
    "search_log": 1,
    "min_match": 7,
    "target_length": 0,
}
"""A match finder that forgets at once: what is left is Huffman coding, which is all that streams of independent symbols gain from."""
SMALL, LARGE = 1 << 14, 1 << 20
"""Streams up to SMALL bytes are always searched at the highest level, longer ones than LARGE at a lower one."""

BLOCK = 1 << 17
"""The most bytes that a block of a zstandard frame decodes to; it takes 4 bytes or more."""


def squeeze(raw: Bytes) -> bytes:
    """Code a stream as well as zstandard can in reasonable time; bytes that cannot be coded shorter are returned as they are."""
    data = raw.tobytes()
    best = min(data, _compress(data, "huffman"), key=len)
    matched = _compress(data, 3)
    if len(data) <= SMALL or len(matched) < 0.98 * len(best):
        best = min(best, matched, _compress(data, 19 if len(data) <= LARGE else 12), key=len)
    return best


def cost(raw: Bytes) -> int:
    """About what `squeeze` would return, in bytes, without the long search."""
    data = raw.tobytes()
    return min(len(data), len(_compress(data, "huffman")), len(_compress(data, 3)))


def expand(coded: bytes | memoryview, size: int) -> Bytes:
    """Undo `squeeze`; ``size`` is the length of the stream before it."""
    if not 0 <= size <= (len(coded) // 4 + 1) * BLOCK:
        raise WeightsError(f"{len(coded)} bytes cannot hold a stream of {size}")
    if len(coded) == size:
        return np.frombuffer(coded, np.uint8)
    data = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS).decompress(coded, max_output_size=size)
    if len(data) != size:
        raise WeightsError(f"a stream holds {len(data)} bytes where its index says {size}")
    return np.frombuffer(data, np.uint8)


def entropy(symbols: NDArray[np.integer]) -> float:
    """Order-0 entropy of a whole stream of small non-negative integers, in bytes: ``-sum n_s log2(n_s / n) / 8``."""
    if not symbols.size:
        return 0.0
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / symbols.size)).sum() / 8) + 0.0


def _compress(data: bytes, level: int | str) -> bytes:
    if isinstance(level, str):
        parameters = zstandard.ZstdCompressionParameters(**HUFFMAN, **BARE)
    else:
        parameters = zstandard.ZstdCompressionParameters.from_level(level, source_size=len(data), **BARE)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)
