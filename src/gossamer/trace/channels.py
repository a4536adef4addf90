"""The channel map: which channels live and die together, where each class appears, and what is frozen and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One labelled dimension of one parameter or buffer.

    Attributes:
        tensor: state-dict name (for a tied tensor, the first of its names).
        dim: the dimension.
        labels: int64 class ids, -1 where an element belongs to no class. Shape ``(size,)``; or ``(blocks, size)`` where the
            positions of this dimension mean other channels in each equal block of dimension 0 (dim 1 of a grouped convolution).
        role: ``"out"`` produces the channels, ``"in"`` consumes them, ``"pointwise"`` scales or shifts them (bias, norm).
    """

    tensor: str
    dim: int
    labels: Tensor
    role: Literal["out", "in", "pointwise"]


@dataclass(frozen=True)
class ChannelGroup:
    """A family: classes that appear in exactly the same places. Each class can be removed without the others.

    Attributes:
        name: module path of the first producer (``"features.0.0"``), made unique by a suffix ``#2`` where needed.
        classes: int64 class ids, in channel order of the producer.
        width: channels of the producer that one class stands for (16 for heads of dimension 16; else mostly 1).
        frozen: why no class of it can be removed (operation and module), or None.
        inexact: why the zeroed network differs from the pruned one by construction (a norm over channels, for example); empty where exact.
    """

    name: str
    classes: Tensor
    width: int = 1
    frozen: str | None = None
    inexact: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChannelMap:
    """All channel groups of a network.

    Attributes:
        groups: prunable families, in execution order.
        frozen: families that must stay, with their reason.
        axes: every labelled dimension of every parameter and buffer.
        num_classes: class ids run from 0 to this.
        unvisited: modules that no pass reaches, with the reason; they stay as they are.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[ChannelGroup, ...]
    axes: tuple[Axis, ...]
    num_classes: int
    unvisited: Mapping[str, str] = field(default_factory=dict)

    def axes_of(self, group: ChannelGroup) -> tuple[Axis, ...]:
        """The axes in which classes of ``group`` appear."""
        first = int(group.classes[0])
        return tuple(a for a in self.axes if bool((a.labels == first).any()))

    def keep_masks(self, removed: Tensor) -> dict[tuple[str, int], Tensor]:
        """What stays when classes are removed.

        Args:
            removed: bool, shape ``(num_classes,)``.

        Returns:
            ``(tensor, dim) -> bool mask`` of the shape of the axis' labels, for every axis that loses something.
        """
        masks = {}
        for a in self.axes:
            gone = removed[a.labels.clamp(min=0)] & (a.labels >= 0)
            if bool(gone.any()):
                masks[a.tensor, a.dim] = ~gone
        return masks

    def __str__(self) -> str:
        from gossamer.report.text import channels_table

        return channels_table(self)
