"""Channels in another order, or several times over: what grouped and depthwise convolutions need around them to be exchanged for dense ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ChannelOrder(nn.Module):
    """Puts channels in another order: one Gather in ONNX. The order belongs to the plan, so that it is no part of the weights.

    Examples:
        >>> ChannelOrder([2, 0, 1], spatial=1)(torch.tensor([[[0.0], [1.0], [2.0]]])).flatten()
        tensor([2., 0., 1.])

    Args:
        order: for each channel of the output, the channel of the input that it is.
        spatial: dimensions after the channels.
        device: of the order.
    """

    index: Tensor

    def __init__(self, order: Sequence[int], *, spatial: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.channels, self.dim = len(order), -spatial - 1
        self.register_buffer("index", torch.tensor(list(order), dtype=torch.long, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., channels, *spatial)`` to the same shape."""
        return x.index_select(self.dim, self.index)

    def extra_repr(self) -> str:
        """What its print shows."""
        return f"{self.channels} channels"


class ChannelRepeat(nn.Module):
    """All channels, several times over: one Concat in ONNX. Runtimes have fast kernels for one output of each input of a depthwise convolution.

    Examples:
        >>> ChannelRepeat(2, spatial=1)(torch.tensor([[[1.0], [3.0]]])).flatten()
        tensor([1., 3., 1., 3.])

    Args:
        times: 1 or more.
        spatial: dimensions after the channels.
    """

    def __init__(self, times: int, *, spatial: int) -> None:
        super().__init__()
        self.times, self.dim = times, -spatial - 1

    def forward(self, x: Tensor) -> Tensor:
        """``(..., channels, *spatial)`` to ``(..., times * channels, *spatial)``."""
        return torch.cat([x] * self.times, self.dim)

    def extra_repr(self) -> str:
        """What its print shows."""
        return f"{self.times} times"
