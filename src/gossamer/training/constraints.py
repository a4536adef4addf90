"""What a plan demands of a network that goes on training: its zeros stay zero, its shared weights move together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.plan import Mask, Plan, Share
from gossamer.result import Result
from gossamer.training.codebooks import replaced, share_parameters, unshare

AfterStep = Callable[[nn.Module], None]


class HeldZeros:
    """Sets masked entries to zero again after every step; weight decay and momentum may have moved them.

    Examples:
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

    def mapped(self, change: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> HeldZeros:
        """The same for other tensors: ``change`` is given the masks by name."""
        return HeldZeros(change(self._masks))

    def __call__(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name, kept in self._masks.items():
            p = parameters[name].detach()
            own = p.to_local() if hasattr(p, "to_local") else p  # of a weight that processes divide among them, the part of this one
            if kept.device != own.device or kept.stride() != own.stride() or kept.shape != own.shape:
                kept = self._masks[name] = _as(kept, p)  # once, on the device and in the layout of training
            own.mul_(kept)


def _as(kept: Tensor, p: Any) -> Tensor:
    """A mask on the device of a weight and laid out as it is, or its part where the weight is one."""
    if hasattr(p, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = p.device_mesh, p.placements
        return distribute_tensor(kept.to(p.device), mesh, placements, src_data_rank=None).to_local()
    return torch.empty_like(p, dtype=torch.bool).copy_(kept)


def held_by(plan: Plan, network: nn.Module) -> HeldZeros | None:
    """What holds the zeros of a plan's masks, read off the network, whose channels may have been cut since; None where there are none."""
    parameters = dict(network.named_parameters())
    masks = {e.tensor: parameters[e.tensor].detach() != 0 for e in plan if isinstance(e, Mask) and e.tensor in parameters}
    return HeldZeros(masks) if masks else None


class Constraints:
    """A result's plan, held while its network is trained.

    Args:
        result: whose plan holds; None for a plain network, which has no constraints.
        network: a copy of its network, changed in place: codebooks become its parameters.
    """

    def __init__(self, result: Result | None, network: nn.Module) -> None:
        shares = [e for e in result.plan if isinstance(e, Share)] if result is not None else []
        self._fixed = share_parameters(network, shares)
        self._trained = len(self._fixed) < len({t for e in shares for t in e.tensors})
        self.hold = held_by(result.plan, network) if result is not None else None

    def release(self, network: nn.Module) -> list[Share]:
        """Plain weights again, in place; the codebooks as they were trained."""
        return unshare(network) if self._trained else []

    def onto(self, result: Result, trained: nn.Module, codebooks: list[Share]) -> Result:
        """The result with the trained network and codebooks."""
        notes = result.notes
        if self._fixed:
            for name in self._fixed:
                trained.get_parameter(name).requires_grad_(result.model.get_parameter(name).requires_grad)
            notes += (f"shared values were not trained, the weights are computed from them: {', '.join(self._fixed)}",)
        plan = result.plan.model_copy(update={"edits": tuple(replaced(result.plan.edits, codebooks))})
        return result.with_(model=trained, plan=plan, notes=notes, report=None)


def chained(*hooks: AfterStep | None) -> AfterStep | None:
    """One hook that calls several in order."""
    real = [h for h in hooks if h is not None]
    if len(real) < 2:
        return real[0] if real else None

    def every(model: nn.Module) -> None:
        for hook in real:
            hook(model)

    return every
