"""The ledger of a trace: every label handed out, which labels belong together, which must stay, and what must stay rectangular.

A label is an integer given to one position of one dimension of one parameter or buffer. 0 means "belongs to no channel". Nothing is
resolved while the network runs: pairs are only written down, as arrays, and `gossamer.trace._classes` merges them afterwards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Role = Literal["out", "in", "pointwise"]
Array = np.ndarray
Reason = str | Callable[[], str]


@dataclass(frozen=True)
class Origin:
    """Where a run of labels came from: one dimension of one tensor; ``blocks`` is set where each block of dimension 0 has labels of its own.

    A tensor that Python made and that belongs to no module has no name.
    """

    start: int
    tensor: str
    dim: int
    size: int
    blocks: int | None = None

    @property
    def count(self) -> int:
        """Number of labels."""
        return self.size * (self.blocks or 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the labels: ``(size,)`` or ``(blocks, size)``."""
        return (self.size,) if self.blocks is None else (self.blocks, self.size)


@dataclass(frozen=True)
class Rectangle:
    """Labels that must stay rectangular.

    ``kind`` is ``"box"`` (a tensor of two or more labelled dimensions: classes are unions of slabs along one of them), ``"even"``
    (equal parts of a split: equally many leave each row) or ``"group"`` (rows are groups: whole rows leave, in every one of
    ``parts`` at once, or equally many of each row).
    """

    kind: Literal["box", "even", "group"]
    parts: tuple[Array, ...]
    note: str = ""


def flat(labels: Tensor) -> Array:
    """Labels as a one-dimensional array."""
    return labels.detach().reshape(-1).numpy()


class Ledger:
    """Writes down what a forward pass says about labels.

    Args:
        columns: of labels laid out as rows by positions (heads by head size), whole columns leave instead of whole rows.
    """

    def __init__(self, *, columns: bool = False) -> None:
        self.columns = columns
        self.size = 1
        self.origins: list[Origin] = []
        self.starts: list[int] = []
        self.roles: dict[tuple[str, int], set[Role]] = {}
        self.pairs: list[tuple[Array, Array]] = []
        self.frozen: list[tuple[Array, str]] = []
        self.inexact: list[tuple[Array, str]] = []
        self.rectangles: list[Rectangle] = []
        self.consumed: list[Array] = []
        self.slots: list[Array] = []
        self.rows: list[tuple[Array, str]] = []
        self.declared: dict[str, Array] = {}

    def fresh(self, tensor: str, dim: int, size: int, blocks: int | None = None) -> Tensor:
        """New labels for one dimension of a tensor, as an int64 tensor of shape ``(size,)`` or ``(blocks, size)``."""
        origin = Origin(self.size, tensor, dim, size, blocks)
        self.origins.append(origin)
        self.starts.append(self.size)
        self.size += origin.count
        return torch.arange(origin.start, self.size).reshape(origin.shape)

    def origin(self, label: int) -> Origin | None:
        """Where a label came from."""
        return self.origins[bisect_right(self.starts, label) - 1] if label > 0 else None

    def mark(self, labels: Tensor, role: Role) -> None:
        """Note the role in which the dimensions that gave these labels are used."""
        ids = flat(labels)
        ends = {int(ids[0]), int(ids[-1])}
        found = {o for o in map(self.origin, ends) if o is not None}
        first = next(iter(found), None)
        if len(found) != 1 or first is None or not ((ids >= first.start) & (ids < first.start + first.count)).all():
            index = np.unique(np.searchsorted(np.asarray(self.starts), np.unique(ids[ids > 0]), side="right")) - 1
            found = {self.origins[i] for i in index}
        for o in found:
            self.roles.setdefault((o.tensor, o.dim), set()).add(role)

    def unify(self, a: Tensor, b: Tensor, reason: Reason) -> None:
        """Labels at the same position belong together; one that meets 0 must stay."""
        if a is b:
            return
        if a.shape != b.shape:
            a, b = torch.broadcast_tensors(a, b)
        x, y = flat(a), flat(b)
        differ = x != y
        if not differ.any():
            return
        x, y = x[differ], y[differ]
        alone = (x == 0) | (y == 0)
        if alone.any():
            self.freeze(torch.from_numpy(np.maximum(x, y)[alone]), reason)
            x, y = x[~alone], y[~alone]
        self.pairs.append((x, y))

    def consume(self, labels: Tensor) -> None:
        """An operation without weights of its own sums over these labels."""
        self.consumed.append(flat(labels))

    def freeze(self, labels: Tensor, reason: Reason) -> None:
        """These labels must stay."""
        self.frozen.append((flat(labels), reason if isinstance(reason, str) else reason()))

    def blur(self, labels: Tensor, reason: Reason) -> None:
        """A network without these labels differs from the zeroed one by construction."""
        self.inexact.append((flat(labels), reason if isinstance(reason, str) else reason()))

    def blur_rows(self, rows: Tensor, reason: Reason) -> None:
        """Each row, shape ``(rows, n)``, is normalised as a whole: its labels are inexact unless they all leave together."""
        self.rows.append((rows.detach().numpy(), reason if isinstance(reason, str) else reason()))

    def declare(self, path: str, labels: Tensor) -> None:
        """The module at ``path`` declares the size of a dimension with these labels, whether or not it owns a tensor of that size."""
        self.declared.setdefault(path, flat(labels))

    def rectangle(self, kind: Literal["box", "even", "group"], *parts: Tensor, note: str = "") -> None:
        """These labels must stay rectangular."""
        self.rectangles.append(Rectangle(kind, tuple(p.detach().numpy() for p in parts), note))

    def slot(self, labels: Tensor) -> None:
        """A part of a tensor that is used by itself: something of it must stay."""
        self.slots.append(flat(labels))
