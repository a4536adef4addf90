"""Rounding with learned steps: straight through for values, LSQ's gradient for steps. Letters: N samples, C channels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.plan import QuantizeActivation, QuantizeWeight
from gossamer.quantization.ops import along, limits


class LearnedStep(nn.Module):
    """A step that is trained: ``first * ratio``, where the parameter ``ratio`` starts at 1.

    The gradient of ``ratio`` is LSQ's of the step, with its scale, divided by ``first``: a step of SGD then changes the step by the same
    fraction as it would train it directly, and AdamW, which knows no scale, changes every step by the same fraction.

    Args:
        first: positive steps, shape (C,) or ().
        largest: what the step may not exceed, or None.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153, section 2.
    """

    first: Tensor

    def __init__(self, first: Tensor, largest: float | None = None) -> None:
        super().__init__()
        self.largest = largest
        self.register_buffer("first", first)
        self.ratio = nn.Parameter(torch.ones_like(first))

    def step(self) -> Tensor:
        """The step, shape (C,) or ()."""
        return self.first * self.ratio.detach()

    def hold(self) -> None:
        """Put the step back into its range, in place: positive, and at most ``largest``."""
        self.ratio.data.clamp_(min=1e-3)
        if self.largest is not None:
            self.ratio.data.clamp_(max=self.largest / float(self.first))


class RoundedActivation(LearnedStep):
    """Rounds an activation as an edit says, with a step that is trained; the zero point stays.

    Examples:
        >>> edit = QuantizeActivation(point="input:0", bits=8, signed=False, step=0.5, zero_point=0)
        >>> RoundedActivation(edit)(torch.tensor([-1.0, 0.6, 999.0]))
        tensor([  0.0000,   0.5000, 127.5000], grad_fn=<_RoundActivationBackward>)

    Args:
        edit: its point, bits, first step and zero point.
        largest: what the step may not exceed, or None.
    """

    def __init__(self, edit: QuantizeActivation, largest: float | None = None) -> None:
        first = edit.step if largest is None else min(edit.step, largest)
        super().__init__(torch.tensor(first, dtype=torch.float32), largest)
        self.edit = edit
        self.low, self.high = limits(edit.bits, edit.signed)

    def forward(self, x: Tensor) -> Tensor:
        """Rounded values, of the shape of ``x``."""
        rounded: Tensor = _RoundActivation.apply(x, self.ratio, self.first, self.edit.zero_point, self.low, self.high)
        return rounded

    def edited(self) -> QuantizeActivation:
        """The edit with the trained step."""
        return self.edit.model_copy(update={"step": float(self.step())})


class RoundedWeight(LearnedStep):
    """Rounds a weight as an edit says, with steps that are trained.

    Examples:
        >>> edit = QuantizeWeight(tensor="w", bits=2, axis=0, signed=True, steps=(1.0, 0.5), zero_points=(0, 0))
        >>> RoundedWeight(edit)(torch.tensor([[0.6, 9.0], [0.6, -9.0]])).tolist()
        [[1.0, 1.0], [0.5, -1.0]]

    Args:
        edit: its tensor, bits, axis and first steps.
    """

    def __init__(self, edit: QuantizeWeight) -> None:
        super().__init__(torch.tensor(edit.steps if edit.axis is not None else edit.steps[0], dtype=torch.float32))
        self.edit = edit
        self.low, self.high = limits(edit.bits, True)

    def forward(self, w: Tensor) -> Tensor:
        """Rounded values, of the shape of ``w``."""
        rounded: Tensor = _RoundWeight.apply(w, self.ratio, self.first, self.edit.axis, self.low, self.high)
        return rounded


class _RoundActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ratio: Tensor, first: Tensor, zero: int, low: int, high: int) -> Tensor:
        kind, x, step = x.dtype, x.float(), first * ratio
        q = (x / step).round_()
        y = (q.add_(zero).clamp_(low, high).sub_(zero) if zero else q.clamp_(low, high)).mul_(step)
        ctx.save_for_backward(x, y, step, first)
        ctx.bounds, ctx.kind = (low - zero, high - zero), kind
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, step, first = ctx.saved_tensors
        g = grads[0].float()
        dx = _inside(g, x, step, ctx.bounds)
        features = max(1, x.numel() // x.shape[0]) if x.dim() else 1
        scale = 1 / math.sqrt(features * max(ctx.bounds))
        return dx.to(ctx.kind), (_inner(g, y) - _inner(dx, x)) / step * (scale / first), None, None, None, None


class _RoundWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, ratio: Tensor, first: Tensor, axis: int | None, low: int, high: int) -> Tensor:
        step = along(first * ratio, w, axis)
        y = (w / step).round_().clamp_(low, high).mul_(step)
        ctx.save_for_backward(w, y, step, first)
        ctx.axis, ctx.bounds = axis, (low, high)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, y, step, first = ctx.saved_tensors
        g, (low, high) = grads[0], ctx.bounds
        dw = g * ((w > step * low) & (w < step * high))
        each = (g * y).sub_(dw * w).div_(step)
        summed = each.sum() if ctx.axis is None else each.sum([d for d in range(w.dim()) if d != ctx.axis])
        scale = 1 / math.sqrt(max(1, w.numel() // first.numel()) * high)
        return dw, summed * (scale / first), None, None, None, None


def _inside(g: Tensor, x: Tensor, step: Tensor, bounds: tuple[int, int]) -> Tensor:
    """The gradient where a value is not clipped, 0 elsewhere: in one pass on the CPU, where reading the step is free."""
    low, high = bounds
    if g.device.type == "cpu":
        s = float(step)
        return torch.ops.aten.hardtanh_backward(g, x, low * s, high * s)
    return g * ((x > low * step) & (x < high * step))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products, without a copy where both are dense in the same layout."""
    if a.dim() == 4 and not a.is_contiguous():
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1), b.reshape(-1))
