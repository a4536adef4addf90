"""What edits of weights hold and do: masks packed into text, entries snapped to codebooks."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import PlanError


def pack_mask(kept: Tensor) -> str:
    """A boolean mask as text: eight entries a byte, zlib, base64.

    Examples:
        >>> kept = torch.tensor([[True, False], [False, True]])
        >>> bool((unpack_mask(pack_mask(kept), (2, 2)) == kept).all())
        True
    """
    bits = np.packbits(kept.detach().cpu().reshape(-1).numpy())
    return base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode()


def unpack_mask(packed: str, shape: Sequence[int]) -> Tensor:
    """The mask that `pack_mask` packed; PlanError where it is damaged or of another size."""
    try:
        bits = np.frombuffer(zlib.decompress(base64.b64decode(packed, validate=True)), np.uint8)
    except (ValueError, zlib.error):
        raise PlanError("a mask of the plan is damaged") from None
    count = prod(shape)
    if len(bits) != -(-count // 8):
        raise PlanError(f"a mask of the plan has {len(bits)} bytes, and {count} entries need {-(-count // 8)}")
    return torch.from_numpy(np.unpackbits(bits, count=count).astype(bool)).reshape(tuple(shape))


def snap(w: Tensor, codebooks: Sequence[Sequence[float]], *, zeros: bool) -> Tensor:
    """Every entry replaced by the nearest value of the codebook of its block of dimension 0; a tie goes to the lower value.

    Examples:
        >>> snap(torch.tensor([0.0, 0.4, 0.9]), [[-1.0, 0.5, 1.0]], zeros=True)
        tensor([0.0000, 0.5000, 1.0000])

    Args:
        w: a weight whose dimension 0 is a multiple of the number of codebooks.
        codebooks: ascending values.
        zeros: entries that are exactly zero stay zero.

    Raises:
        PlanError: codebooks that are empty or do not divide dimension 0.
    """
    if not codebooks or w.shape[0] % len(codebooks) or not all(codebooks):
        raise PlanError(f"{len(codebooks)} codebooks do not fit a weight of shape {tuple(w.shape)}")
    blocks = w.detach().reshape(len(codebooks), -1)
    out = torch.empty_like(blocks)
    for block, values, into in zip(blocks, codebooks, out, strict=True):
        codebook = torch.tensor(values, dtype=w.dtype, device=w.device)
        into.copy_(codebook[torch.bucketize(block.contiguous(), (codebook[1:] + codebook[:-1]) / 2)])
    if zeros:
        out = torch.where(blocks == 0, blocks, out)
    return out.reshape(w.shape)
