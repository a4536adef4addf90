"""Networks without their weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def skeleton_of(model: nn.Module, device: str | torch.device = "meta") -> nn.Module:
    """A copy of a network whose state dict holds nothing yet; tied tensors stay tied, and buffers that no state dict has keep their values.

    Example:
        >>> one, two = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> two.weight = one.weight
        >>> made = skeleton_of(nn.Sequential(one, two))
        >>> made[0].weight is made[1].weight, made[0].weight.device.type
        (True, 'meta')

    Args:
        model: the network.
        device: of the copy; ``"meta"`` takes no memory.
    """
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
    kept = set(model.state_dict(keep_vars=True))
    for name, b in model.named_buffers():
        if name in kept:
            memo[id(b)] = torch.empty_like(b, device=device)
        elif torch.device(device).type != "meta":  # no state dict will fill it
            memo[id(b)] = b.detach().to(device, copy=True)
    return copy.deepcopy(model, memo)
