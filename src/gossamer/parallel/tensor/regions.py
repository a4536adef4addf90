"""Where a network's split parts begin and end: layers that take the whole input, and layers whose outputs are summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.parallel.tensor.collectives import Ranks, enter, leave

_REGION = "_gossamer_region"


class Streams:
    """Two streams of random numbers: one that all ranks share, and in split parts one of each rank's own.

    A split part draws other numbers on each rank, and after it all ranks draw the same again, however many channels each has.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.random: Any = torch.cuda if device.type == "cuda" else torch
        self._common: Tensor | None = None

    def inside(self) -> None:
        """A split part begins."""
        if self._common is None:
            seed = int(torch.randint(2**62, (), device="cuda" if self.random is torch.cuda else "cpu"))
            self._common = self.random.get_rng_state()
            (torch.default_generator if self.random is torch else torch.cuda).manual_seed(seed ^ (self.rank * 0x9E3779B97F4A7C15 % 2**62))

    def outside(self) -> None:
        """It ends."""
        if self._common is not None:
            self.random.set_rng_state(self._common)
            self._common = None


class Region:
    """One split part: from the layers that make its channels to those that use them up.

    Args:
        ranks: that share the channels.
        streams: of random numbers, the same object for all regions of a network; None where nothing is random.
    """

    def __init__(self, ranks: Ranks, streams: Streams | None) -> None:
        self.ranks, self.streams = ranks, streams
        self._last: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> Region:
        return self

    def enter(self, value: Any, training: bool) -> Any:
        """What a layer at the beginning takes; a tensor that several layers take enters once."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if training and self.streams is not None:
            self.streams.inside()
        if not value.requires_grad or not torch.is_grad_enabled():
            return value
        if self._last is None or self._last[0] is not value:
            self._last = value, enter(value, self.ranks)
        return self._last[1]

    def leave(self, value: Tensor) -> Tensor:
        """What a layer at the end gives."""
        self._last = None
        if self.streams is not None:
            self.streams.outside()
        return leave(value, self.ranks)


def _begins(kind: type[nn.Module]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        region: Region = self.__dict__[_REGION]
        taken = tuple(region.enter(a, self.training) for a in args)
        named = {k: region.enter(v, self.training) for k, v in kwargs.items()}
        return kind.forward(self, *taken, **named)

    return forward


def _ends(kind: type[nn.Module]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        region: Region = self.__dict__[_REGION]
        bias = self._parameters.get("bias")
        try:
            if bias is not None:
                self._parameters["bias"] = None
            out = kind.forward(self, *args, **kwargs)
        finally:
            if bias is not None:
                self._parameters["bias"] = bias
        out = region.leave(out)
        if bias is None:
            return out
        spatial = len(getattr(self, "kernel_size", ()))
        return out + bias.to(out.dtype).reshape(-1, *[1] * spatial)

    return forward


_MADE: dict[tuple[type, str], type] = {}


def mark(module: nn.Module, region: Region, where: str) -> None:
    """Make a layer the beginning or the end of a region, in place; it stays an instance of its class.

    Args:
        module: a layer of its own; at the end a linear layer or convolution.
        region: it belongs to.
        where: ``"begin"`` or ``"end"``.
    """
    kind = type(module)
    if (kind, where) not in _MADE:
        forward = _begins(kind) if where == "begin" else _ends(kind)
        _MADE[kind, where] = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__})
    module.__class__ = _MADE[kind, where]
    module.__dict__[_REGION] = region
