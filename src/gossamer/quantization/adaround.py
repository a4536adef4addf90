"""Learned rounding: each weight learns whether to go up or down, so that the layer's output changes least."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.quantization.ops import limits

_LOW, _HIGH = -0.1, 1.1  # how far the sigmoid is stretched before it is clipped to 0 to 1


def adaround(
    w_GRK: Tensor, h_GKK: Tensor, steps_GR: Tensor, bits: int, *, iterations: int = 600, rate: float = 0.02, weight: float = 0.5
) -> Tensor:
    """Learn which of its two neighbouring codes each weight takes, for the least error of the layer's output.

    The error over all calibration positions is the quadratic form of the inputs' covariance, so that its gradient is exact and one product of
    matrices. A penalty that grows sharper drives the soft choices to 0 or 1.

    Examples:
        >>> from gossamer.quantization.rounding import damped, output_error
        >>> g = torch.Generator().manual_seed(0)
        >>> x, w = torch.randn(64, 8, generator=g) @ torch.randn(8, 8, generator=g), torch.randn(1, 4, 8, generator=g)
        >>> h, step = damped(x.T.cov()[None]), torch.full((1, 4), 0.4)
        >>> near, learned = (w / 0.4).round().clamp(-8, 7), adaround(w, h, step, 4)
        >>> bool(output_error(w, learned, h, step).sum() < output_error(w, near, h, step).sum())
        True

    Args:
        w_GRK: weights.
        h_GKK: covariance of the inputs.
        steps_GR: step of each output.
        bits: 2 to 8.
        iterations: steps of Adam.
        rate: its learning rate.
        weight: of the penalty, beside an error of 1 for rounding to nearest.

    Returns:
        Codes as floats, shape of ``w_GRK``.

    Source:
        Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, equations 21 to 24.
    """
    low, high = limits(bits, True)
    s = steps_GR[:, :, None]
    floor = (w_GRK / s).floor().clamp_(low, high)
    share = (w_GRK / s - floor).clamp_(0.01, 0.99)
    v = torch.logit(((share - _LOW) / (_HIGH - _LOW)).clamp(1e-4, 1 - 1e-4))
    nearest = (w_GRK / s).round_().clamp_(low, high) * s - w_GRK
    scale = ((nearest @ h_GKK) * nearest).sum(2, keepdim=True).clamp(min=1e-30)
    per_entry = weight / w_GRK.shape[2]
    mean, square = torch.zeros_like(v), torch.zeros_like(v)
    for i in range(iterations):
        sigmoid = torch.sigmoid(v)
        stretched = sigmoid * (_HIGH - _LOW) + _LOW
        up = stretched.clamp(0, 1)
        error = (floor + up).clamp_(low, high) * s - w_GRK
        gradient = 2 * (error @ h_GKK) * s / scale
        progress = i / iterations
        if progress > 0.2:
            beta = 2 + 18 * (1 + torch.cos(torch.tensor((progress - 0.2) / 0.8 * torch.pi)).item()) / 2
            away = 2 * up - 1
            gradient = gradient - per_entry * 2 * beta * away.sign() * away.abs() ** (beta - 1)
        inside = (stretched > 0) & (stretched < 1)
        gradient = gradient * inside * sigmoid * (1 - sigmoid) * (_HIGH - _LOW)
        mean.mul_(0.9).add_(gradient, alpha=0.1)
        square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        v -= rate * (mean / (1 - 0.9 ** (i + 1))) / ((square / (1 - 0.999 ** (i + 1))).sqrt() + 1e-12)
    return (floor + (torch.sigmoid(v) > 0.5)).clamp_(low, high)
