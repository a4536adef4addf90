"""The two operations of a quantised network, as torch operators that stay whole through torch.export."""

from __future__ import annotations

import torch
from torch import Tensor


def limits(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest code.

    Examples:
        >>> limits(8, True), limits(4, False)
        ((-128, 127), (0, 15))
    """
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def along(values: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """Reshape ``values`` of shape ``(C,)`` so that they broadcast along ``axis`` of ``like``; as they are where ``axis`` is None."""
    if axis is None or values.dim() == 0:
        return values
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.reshape(shape)


@torch.library.custom_op("gossamer::dequantize", mutates_args=())
def dequantize(q: Tensor, step: Tensor, zero_point: Tensor | None, axis: int | None) -> Tensor:
    """``(q - zero_point) * step`` as float32, steps along ``axis`` (None: one step)."""
    x = q.to(step.dtype)
    if zero_point is not None:
        x = x - along(zero_point, q, axis).to(step.dtype)
    return x * along(step, q, axis)


@dequantize.register_fake
def _(q: Tensor, step: Tensor, zero_point: Tensor | None, axis: int | None) -> Tensor:
    return torch.empty_like(q, dtype=step.dtype)


@torch.library.custom_op("gossamer::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, step: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """``(clamp(round(x / step) + zero_point, low, high) - zero_point) * step``: halves round to even, as in ONNX's QuantizeLinear."""
    zero = zero_point.to(x.dtype)
    return (x / step).round_().add_(zero).clamp_(low, high).sub_(zero).mul_(step)


@quantize_dequantize.register_fake
def _(x: Tensor, step: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    return torch.empty_like(x)
