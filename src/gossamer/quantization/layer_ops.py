"""Whole layers as torch operators: a linear layer whose input is rounded when it runs, one with a step for each group, a table, an LSTM.

Shape letters: N output features, K input features, G groups of K, T time steps, B batch, D directions, I inputs, H hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.quantization.ops import along


def round_by_range(x: Tensor) -> Tensor:
    """A tensor rounded to 256 levels that cover its own range and 0, as ONNX's DynamicQuantizeLinear does.

    Examples:
        >>> round_by_range(torch.tensor([0.0, 0.4, 255.0]))
        tensor([  0.,   0., 255.])
    """
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = ((high - low) / 255).clamp(min=1e-30)
    zero = (-low / step).round_().clamp_(0, 255)
    return (x / step).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(step)


def _weights(q: Tensor, step: Tensor, zero_point: Tensor | None) -> Tensor:
    w = q.to(step.dtype)
    if zero_point is not None:
        w = w - along(zero_point, q, 0).to(step.dtype)
    return w * along(step, q, 0)


@torch.library.custom_op("gossamer::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, q_NK: Tensor, step_N: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Tensor:
    """A linear layer with integer weights on an input that is rounded by its own range."""
    return F.linear(round_by_range(x), _weights(q_NK, step_N, zero_point), bias)


@dynamic_linear.register_fake
def _(x: Tensor, q_NK: Tensor, step_N: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], q_NK.shape[0]))


@torch.library.custom_op("gossamer::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, q_NK: Tensor, step_NG: Tensor, bias: Tensor | None, group: int, bits: int) -> Tensor:
    """A linear layer in float whose weights are codes of ``bits`` bits with a step for each ``group`` of input features."""
    w = q_NK.to(step_NG.dtype) * step_NG.repeat_interleave(group, 1)[:, : q_NK.shape[1]]
    return F.linear(x, w, bias)


@grouped_linear.register_fake
def _(x: Tensor, q_NK: Tensor, step_NG: Tensor, bias: Tensor | None, group: int, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], q_NK.shape[0]))


@torch.library.custom_op("gossamer::table", mutates_args=())
def table(q: Tensor, step: Tensor, zero_point: Tensor | None, index: Tensor) -> Tensor:
    """Rows of an integer table in float: ``(q[index] - zero_point[index]) * step[index]``."""
    rows = q[index].to(step.dtype)
    if zero_point is not None:
        rows = rows - zero_point[index].unsqueeze(-1).to(step.dtype)
    return rows * step[index].unsqueeze(-1)


@table.register_fake
def _(q: Tensor, step: Tensor, zero_point: Tensor | None, index: Tensor) -> Tensor:
    return step.new_empty((*index.shape, q.shape[1]))


@torch.library.custom_op("gossamer::dynamic_lstm", mutates_args=())
def dynamic_lstm(
    x_TBI: Tensor, h_DBH: Tensor, c_DBH: Tensor, w_DIZ: Tensor, r_DHZ: Tensor, w_step: Tensor, r_step: Tensor, bias: Tensor, zero: int
) -> tuple[Tensor, Tensor, Tensor]:
    """An LSTM of one or two directions; inputs and hidden states are rounded by their own range. Z is 4 H, gates in ONNX's order i, o, f, c.

    Args:
        bias: (D, 8 H), of the inputs and of the hidden states.
        zero: zero point of the codes.

    Returns:
        Outputs (T, B, D * H), and the last states, (D, B, H) each.
    """
    x = round_by_range(x_TBI)
    outs, states = [], []
    for d in range(h_DBH.shape[0]):
        w = (w_DIZ[d].float() - zero) * w_step[d]
        r = (r_DHZ[d].float() - zero) * r_step[d]
        added = bias[d].view(2, -1).sum(0)
        fed = x @ w + added
        h, c, steps = h_DBH[d], c_DBH[d], []
        for t in range(len(x)) if d == 0 else range(len(x) - 1, -1, -1):
            i, o, f, g = (fed[t] + round_by_range(h) @ r).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        outs.append(torch.stack(steps if d == 0 else steps[::-1]))
        states.append((h, c))
    return torch.cat(outs, -1), torch.stack([h for h, _ in states]), torch.stack([c for _, c in states])


@dynamic_lstm.register_fake
def _(
    x_TBI: Tensor, h_DBH: Tensor, c_DBH: Tensor, w_DIZ: Tensor, r_DHZ: Tensor, w_step: Tensor, r_step: Tensor, bias: Tensor, zero: int
) -> tuple[Tensor, Tensor, Tensor]:
    d, _, h = h_DBH.shape
    return x_TBI.new_empty((*x_TBI.shape[:2], d * h)), torch.empty_like(h_DBH), torch.empty_like(c_DBH)
