"""What the labels of a trace predict about a cut network: the shape of every result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.trace import Step, Trace

Shape = tuple[int, ...]


class Prediction:
    """Shapes once classes are gone; each plane is looked at once.

    Args:
        traced: of the original.
        removed: bool, shape ``(num_classes,)``.
    """

    def __init__(self, traced: Trace, removed: Tensor) -> None:
        gone = torch.cat([removed, torch.zeros(1, dtype=torch.bool)])  # class -1: not a channel
        self._stays = ~gone[torch.from_numpy(traced.classes.of)]
        self._known: dict[int, tuple[Tensor, dict[int, int] | None]] = {}

    def sizes(self, plane: Tensor) -> dict[int, int] | None:
        """Size left along each labelled dimension of a plane that loses something; None where what is left is not rectangular."""
        known = self._known.get(id(plane))
        if known is None:
            known = self._known[id(plane)] = (plane, self._sizes(plane))
        return known[1]

    def _sizes(self, plane: Tensor) -> dict[int, int] | None:
        stays = self._stays[plane]
        kept = int(stays.sum())
        if kept == stays.numel():
            return {}
        out, count = {}, 1
        for d, n in enumerate(plane.shape):
            if n > 1:
                out[d] = int(stays.movedim(d, 0).reshape(n, -1).any(1).sum())
                count *= out[d]
        return out if count == kept else None

    def shapes(self, step: Step) -> list[Shape | None]:
        """Shapes of the results of a step; None where one does not stay rectangular."""
        out: list[Shape | None] = []
        for shape, planes in zip(step.shapes, step.outputs, strict=True):
            size: list[int] | None = list(shape)
            for plane in planes:
                left = self.sizes(plane)
                if left is None:
                    size = None
                    break
                for d, n in left.items():
                    if size is not None:
                        size[d] = n
            out.append(tuple(size) if size is not None else None)
        return out

    def along(self, planes: Sequence[Tensor], dim: int) -> Tensor | None:
        """Which positions of a dimension stay, from the planes that vary along it; None where none loses anything."""
        found: Tensor | None = None
        for plane in planes:
            if not -plane.dim() <= dim < plane.dim() or plane.shape[dim] <= 1:
                continue
            stays = self._stays[plane].movedim(dim, 0).reshape(plane.shape[dim], -1).any(1)
            found = stays if found is None else found & stays
        return found if found is not None and not bool(found.all()) else None
