"""Which weights stay: from scores and a target to masks, per row, per layer or over the whole network, free or in a pattern."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gossamer.errors import UsageError, near
from gossamer.projections import largest

SCOPES = ("layer", "global", "row")
"""Within what weights compete: those of a tensor, of the network, of one output channel."""


@dataclass(frozen=True)
class Pattern:
    """A pattern of non-zeros: ``n`` of every ``m`` along the inputs, or whole blocks of ``rows x columns``.

    Examples:
        >>> Pattern.parse("2:4"), Pattern.parse("4x1").block
        (Pattern(n=2, m=4, block=None), (4, 1))
    """

    n: int = 0
    m: int = 0
    block: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``"2:4"`` or ``"4x1"``; UsageError for anything else."""
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            n, m = int(found[1]), int(found[2])
            if not 0 < n < m:
                raise UsageError(f"pattern={text!r}: of M neighbours N stay, 0 < N < M, as in '2:4'")
            return cls(n, m)
        if (found := re.fullmatch(r"(\d+)x(\d+)", text)) and int(found[1]) * int(found[2]) > 1:
            return cls(block=(int(found[1]), int(found[2])))
        raise UsageError(f"pattern={text!r}: write 'N:M' such as '2:4', or blocks of outputs x inputs such as '4x1'")

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it divides a weight of this shape."""
        if self.block is None:
            return shape[1] % self.m == 0
        return shape[0] % self.block[0] == 0 and prod(shape[1:]) % self.block[1] == 0


def nm_mask(score: Tensor, n: int, m: int) -> Tensor:
    """Mask of the ``n`` highest scores of every ``m`` neighbours along dimension 1."""
    moved = score.movedim(1, -1)
    return largest(moved.reshape(-1, m), n).reshape(moved.shape).movedim(-1, 1)


def select(
    scores: Mapping[str, Tensor],
    *,
    sparsity: float | None = None,
    keep: int | None = None,
    scope: str = "layer",
    pattern: Pattern | None = None,
) -> dict[str, Tensor]:
    """Masks of the weights that stay: those with the highest scores; of equal ones those that come first.

    Examples:
        >>> select({"w": torch.tensor([[1.0, 4.0], [2.0, 3.0]])}, sparsity=0.5)
        {'w': tensor([[False,  True],
                [False,  True]])}

    Args:
        scores: for each weight a tensor of its shape, finite; higher is more important.
        sparsity: fraction that goes, of each row, tensor or the network (scope), rounded to whole entries (or blocks).
        keep: how many stay, instead of a fraction.
        scope: ``"layer"``, ``"global"`` or ``"row"``.
        pattern: ``N:M`` (neither ``sparsity`` nor ``keep``), or blocks; every weight must fit it.

    Returns:
        Boolean masks of the same names and shapes.

    Raises:
        UsageError: an unknown scope, or scores that are not finite.
    """
    if scope not in SCOPES:
        raise UsageError(f"scope={scope!r}: known are {', '.join(SCOPES)}{near(str(scope), SCOPES)}")
    for name, score in scores.items():
        if score.numel() and not all(torch.isfinite(v) for v in torch.aminmax(score)):
            raise UsageError(f"{name}: {int((~score.isfinite()).sum())} of {score.numel()} scores are NaN or infinite")
    if pattern is not None and pattern.block is None:
        return {name: nm_mask(score, pattern.n, pattern.m) for name, score in scores.items()}
    units = {name: _units(score, pattern) for name, score in scores.items()}

    def count(n: int) -> int:
        return min(n, keep) if keep is not None else n - round((sparsity or 0.0) * n)

    if scope == "global":
        together = torch.cat([u.reshape(-1).cpu().double() for u in units.values()])
        parts = largest(together[None], count(len(together)))[0].split([u.numel() for u in units.values()])
        kept = {name: part.reshape(units[name].shape).to(scores[name].device) for name, part in zip(units, parts, strict=True)}
    else:
        rows = {name: u.flatten(1) if scope == "row" else u.reshape(1, -1) for name, u in units.items()}
        kept = {name: largest(r, count(r.shape[1])).reshape(units[name].shape) for name, r in rows.items()}
    return {name: _spread(kept[name], scores[name], pattern) for name in scores}


def _units(score: Tensor, pattern: Pattern | None) -> Tensor:
    """What is kept or goes as one: entries, or the summed scores of blocks."""
    if pattern is None or pattern.block is None:
        return score
    rows, columns = pattern.block
    return score.double().reshape(score.shape[0] // rows, rows, -1, columns).sum((1, 3))


def _spread(kept: Tensor, score: Tensor, pattern: Pattern | None) -> Tensor:
    if pattern is None or pattern.block is None:
        return kept
    rows, columns = pattern.block
    return kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1).reshape(score.shape)
