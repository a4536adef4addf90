"""Exponential moving average of the weights, and the best weights so far."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy that follows: ``average = decay * average + (1 - decay) * weights`` after each step; buffers are copied.

    Examples:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> average = make_average(layer, 0.9)
        >>> for value in (1.0, 2.0):
        ...     _ = nn.init.constant_(layer.weight, value)
        ...     average.update_parameters(layer)
        >>> round(average.module.weight.item(), 4)
        1.1
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


class Best:
    """The weights of the best epoch, by a figure of its record.

    Args:
        monitor: a key of the records, ``"val_loss"``; a loss or an error is better when smaller, all else when larger.
        patience: epochs without a better one after which to stop; None never stops, and keeps nothing.
    """

    def __init__(self, monitor: str, patience: int | None) -> None:
        self.monitor, self.patience = monitor, patience
        self.state: dict[str, Tensor] = {}

    def better(self, record: dict[str, Any], history: list[dict[str, Any]]) -> bool:
        """Whether an epoch's record is better than all before it."""
        sign = -1 if any(word in self.monitor for word in ("loss", "mse", "mae", "error")) else 1
        return all(sign * record[self.monitor] > sign * earlier[self.monitor] for earlier in history)

    def keep(self, state: dict[str, Tensor]) -> None:
        """Keep these weights, which are the caller's copy."""
        self.state = state

    def epoch(self, history: list[dict[str, Any]]) -> int:
        """The best epoch, from 1."""
        return max((i + 1 for i in range(len(history)) if self.better(history[i], history[:i])), default=0)

    def exhausted(self, history: list[dict[str, Any]]) -> bool:
        """Whether it is time to stop."""
        return self.patience is not None and bool(history) and len(history) - self.epoch(history) >= self.patience
