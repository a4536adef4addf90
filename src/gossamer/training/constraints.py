"""What a plan demands of a network that goes on training: its zeros stay zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gossamer.plan import Mask, Plan

AfterStep = Callable[[nn.Module], None]


class HeldZeros:
    """Sets masked entries to zero again after every step; weight decay and momentum may have moved them.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> hold = HeldZeros({"weight": torch.tensor([[True, False]])})
        >>> with torch.no_grad():
        ...     hold(net)
        >>> bool(net.weight[0, 1] == 0)
        True

    Args:
        masks: name of a parameter -> where it stays, bool, of its shape.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = dict(masks)

    def __call__(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name, kept in self._masks.items():
            p = parameters[name]
            if kept.device != p.device or kept.stride() != p.stride():  # once, on the device and in the layout of training
                kept = self._masks[name] = torch.empty_like(p, dtype=torch.bool).copy_(kept)
            p.detach().mul_(kept)


def held_by(plan: Plan, network: nn.Module) -> HeldZeros | None:
    """What holds the zeros of a plan's masks, read off the network, whose channels may have been cut since; None where there are none."""
    parameters = dict(network.named_parameters())
    masks = {e.tensor: parameters[e.tensor].detach() != 0 for e in plan if isinstance(e, Mask) and e.tensor in parameters}
    return HeldZeros(masks) if masks else None


def chained(*hooks: AfterStep | None) -> AfterStep | None:
    """One hook that calls several in order."""
    real = [h for h in hooks if h is not None]
    if len(real) < 2:
        return real[0] if real else None

    def every(model: nn.Module) -> None:
        for hook in real:
            hook(model)

    return every
