"""Networks without their weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from gossamer.training.averaging import make_average
from gossamer.training.checkpoint import Parts


def skeleton_of(model: nn.Module, device: str | torch.device = "meta") -> nn.Module:
    """A copy of a network whose state dict holds nothing yet; tied tensors stay tied, and buffers that no state dict has keep their values.

    Examples:
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


def whole_parts(skeleton: nn.Module, parts: Parts, ema: float | None) -> Parts:
    """What a checkpoint of the whole network fills, before a process takes its own of it.

    Args:
        skeleton: of the whole network.
        parts: of this process.
        ema: decay of the average, where ``parts`` has one.
    """
    model = skeleton_of(skeleton, "cpu")
    optimizer: Any = SimpleNamespace(param_groups=[{"params": list(model.parameters())}], state={p: {} for p in model.parameters()})
    modules: dict[str, nn.Module] = {"ema": make_average(model, float(ema or 0.0))} if "ema" in parts.modules else {}
    return Parts(model, optimizer, modules, parts.scaler, dict(parts.best))
