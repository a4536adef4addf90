"""What ranks that share a layer say to one another, as autograd functions, and how much it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class Traffic:
    """What was reduced since the start: calls, and bytes of the tensors (not of what an algorithm sends for them)."""

    calls: int = 0
    bytes: int = 0


class Ranks:
    """The ranks that share a network's channels.

    Args:
        group: their process group; None stands for all ranks.
        agreeing: a larger group that `largest` asks, where several groups do the same; default: the group.
        device: where messages are made of tensors; default: the CPU.

    Attributes:
        rank, degree: place in the group, and its size.
        traffic: what was said.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        agreeing: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.group = group
        self.device = device or torch.device("cpu")
        self.agreeing = agreeing if agreeing is not None else group
        self.rank, self.degree = dist.get_rank(group), dist.get_world_size(group)
        self.traffic = Traffic()

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self

    def total(self, x: Tensor) -> Tensor:
        """The sum over all ranks, as a new tensor."""
        y = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=self.group)
        self.traffic.calls += 1
        self.traffic.bytes += y.numel() * y.element_size()
        return y

    def largest(self, x: Tensor) -> Tensor:
        """The largest over all ranks that agree, as a new tensor."""
        y = x.detach().to(self.device, copy=True)
        dist.all_reduce(y, op=dist.ReduceOp.MAX, group=self.agreeing)
        return y.to(x.device)

    def every(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        """A vector of each rank, of which rank ``r`` has ``sizes[r]`` entries."""
        padded = torch.zeros(max(sizes), dtype=x.dtype, device=x.device)
        padded[: len(x)] = x
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group=self.group)
        return [f[:n] for f, n in zip(found, sizes, strict=True)]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.total(grad), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return ranks.total(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def enter(x: Tensor, ranks: Ranks) -> Tensor:
    """The same tensor; its gradient, of which each rank knows a part, is the sum over the ranks."""
    entered: Tensor = _Enter.apply(x, ranks)
    return entered


def leave(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum over the ranks; its gradient, which each rank knows whole, passes."""
    left: Tensor = _Leave.apply(x, ranks)
    return left
