"""What the networks share: checked arguments, first weights, the head of a pooled classifier."""

from __future__ import annotations

from typing import Literal

from torch import nn

from gossamer.errors import SourceError


def check(name: str, *, num_classes: int, in_channels: int, width_mult: float, dropout: float | None = None) -> None:
    """SourceError where an argument of a network is outside its range.

    Examples:
        >>> check("resnet18", num_classes=10, in_channels=3, width_mult=0.5)

    Args:
        name: of the network.
        num_classes, in_channels: at least 1.
        width_mult: above 0.
        dropout: in [0, 1); None where the network has none.
    """
    if num_classes >= 1 and in_channels >= 1 and 0 < width_mult < float("inf") and (dropout is None or 0 <= dropout < 1):
        return
    if dropout is None:
        wanted, got = "and width_mult > 0", f"{num_classes}, {in_channels} and {width_mult}"
    else:
        wanted, got = "width_mult > 0 and dropout in [0, 1)", f"{num_classes}, {in_channels}, {width_mult} and {dropout}"
    raise SourceError(f"{name} takes num_classes >= 1, in_channels >= 1{',' if dropout is not None else ''} {wanted}, not {got}")


def initialise(network: nn.Module, *, mode: Literal["fan_in", "fan_out"] = "fan_out", linear_std: float | None = None) -> None:
    """First weights: normal by the fan of rectified convolutions (He et al., ICCV 2015), no biases.

    Args:
        network: changed in place.
        mode: ``"fan_out"`` or ``"fan_in"``.
        linear_std: standard deviation of linear layers' weights; None leaves these layers as they are.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
