"""Steps for each group of a weight's input features, and how a plan holds them."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.errors import PlanError
from gossamer.quantization.ops import limits
from gossamer.quantization.steps import mse_steps


def group_steps(w_NK: Tensor, bits: int, group: int) -> Tensor:
    """Step of least squared error for each group of input features.

    Examples:
        >>> group_steps(torch.ones(2, 5), 8, 4).shape
        torch.Size([2, 2])

    Args:
        w_NK: a linear layer's weight.
        bits: 2 to 8.
        group: input features that share a step; the last group may be smaller.

    Returns:
        Positive float32 steps, shape (N, ceil(K / group)).
    """
    groups = -(-w_NK.shape[1] // group)
    padded = F.pad(w_NK.detach().float(), (0, groups * group - w_NK.shape[1]))
    return mse_steps(padded.reshape(-1, group), bits, 0).reshape(-1, groups)


def group_codes(w_NK: Tensor, step_NG: Tensor, bits: int, group: int) -> Tensor:
    """Signed codes of a weight, int8, shape (N, K)."""
    step = step_NG.repeat_interleave(group, 1)[:, : w_NK.shape[1]]
    return (w_NK / step).round_().clamp_(*limits(bits, True)).to(torch.int8)


def pack_steps(steps: Tensor) -> str:
    """Steps as text: float32, zlib, base64.

    Examples:
        >>> unpack_steps(pack_steps(torch.tensor([[0.5, 2.0]])), (1, 2))
        tensor([[0.5000, 2.0000]])
    """
    return base64.b64encode(zlib.compress(steps.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes(), 9)).decode()


def unpack_steps(packed: str, shape: tuple[int, ...]) -> Tensor:
    """The steps that `pack_steps` packed; PlanError where they are damaged or of another number."""
    try:
        values = np.frombuffer(zlib.decompress(base64.b64decode(packed, validate=True)), "<f4")
        return torch.from_numpy(values.astype(np.float32)).reshape(shape)
    except (ValueError, RuntimeError, zlib.error):
        raise PlanError(f"steps of the plan are damaged or not of shape {tuple(shape)}") from None
