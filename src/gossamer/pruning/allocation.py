"""Which classes to remove: the least important per unit of cost first, until a target is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, gcd
from typing import Literal

import torch
from torch import Tensor

from gossamer.errors import BudgetError
from gossamer.pruning.costs import CostModel
from gossamer.trace.channels import ChannelGroup

_ROUNDS = 16  # the price of a class is looked up again this many times on the way to the target


@dataclass(frozen=True)
class Family:
    """A prunable family with its classes in the order in which they go.

    Attributes:
        name: of the channel group.
        order: removable class ids, least important first.
        scores: their importance, in the same order.
        steps: how many of them may be gone, ascending, without 0.
    """

    name: str
    order: Tensor
    scores: Tensor
    steps: Tensor


def families(
    groups: Sequence[ChannelGroup], scores: Tensor, *, round_to: int = 1, floor: float = 0.1, kept: Tensor | None = None
) -> list[Family]:
    """Prepare families for `choose`.

    Args:
        groups: prunable channel groups.
        scores: importance of every class, shape ``(num_classes,)``.
        round_to: kept channel counts are multiples of this; a family that is left alone stays as it is.
        floor: fraction of a family's classes that stays, in [0, 1]; at least one class always does.
        kept: bool, shape ``(num_classes,)``: classes that must stay.

    Returns:
        One `Family` for each group that can lose something.
    """
    out = []
    for g in groups:
        classes = g.classes.long().cpu()
        n = len(classes)
        free = classes if kept is None else classes[~kept[classes]]
        most = min(len(free), n - max(1, ceil(floor * n - 1e-9)))
        gone = torch.arange(1, max(most, 0) + 1)
        unit = round_to // gcd(round_to, g.width)
        gone = gone[(n - gone) % unit == 0]
        if not len(gone):
            continue
        order = torch.argsort(scores[free], stable=True)
        out.append(Family(g.name, free[order], scores[free[order]].double(), gone))
    return out


def choose(
    fams: Sequence[Family], cost: CostModel, target: float, *, scope: Literal["global", "layer"] = "global", per_cost: bool = False
) -> Tensor:
    """Remove classes until ``cost`` is at most ``target``, and as little below it as the step sizes allow.

    Globally, families compete: the least important classes go first, whichever family they are of, or, with ``per_cost``, those with
    the least importance per unit of cost, whose prices are looked up again at every round, because a class gets cheaper as its neighbours
    go. Per layer, every family loses the same fraction.

    Args:
        fams: from `families`.
        cost: what is limited.
        target: in units of ``cost``.
        scope: ``"global"`` or ``"layer"``.
        per_cost: weigh importance against what a class costs.

    Returns:
        bool mask of removed classes, shape ``(num_classes,)``.

    Raises:
        BudgetError: even with every family at its floor the cost stays above the target.
    """
    start = cost.total(torch.zeros(cost.num_classes, dtype=torch.bool))
    best = cost.total(_mask(fams, [int(f.steps[-1]) for f in fams], cost.num_classes))
    if best > target * (1 + 1e-9):
        raise BudgetError(
            f"cannot reach {target / start:.3f} of the {cost.unit}: the lowest possible is {best / start:.3f} "
            f"with every family at its floor; lower floor= or round_to=, or shorten ignore="
        )
    gone = _per_layer(fams, cost, target) if scope == "layer" else _global(fams, cost, start, target, per_cost)
    return _mask(fams, _refill(fams, gone, cost, target), cost.num_classes)


def everything(fams: Sequence[Family], num_classes: int) -> Tensor:
    """Every class that may go: bool mask of shape ``(num_classes,)``."""
    return _mask(fams, [int(f.steps[-1]) for f in fams], num_classes)


def _mask(fams: Sequence[Family], gone: Sequence[int], num_classes: int) -> Tensor:
    removed = torch.zeros(num_classes, dtype=torch.bool)
    for f, n in zip(fams, gone, strict=True):
        removed[f.order[:n]] = True
    return removed


def _per_layer(fams: Sequence[Family], cost: CostModel, target: float) -> list[int]:
    """The smallest common fraction, found among all fractions at which some family takes a step."""
    ratios = torch.cat([f.steps.double() / (len(f.order)) for f in fams]).unique()

    def gone(ratio: float) -> list[int]:
        return [int(f.steps[i - 1]) if (i := int((f.steps <= ratio * len(f.order) + 1e-9).sum())) else 0 for f in fams]

    low, high = 0, len(ratios) - 1
    while low < high:
        mid = (low + high) // 2
        if cost.total(_mask(fams, gone(float(ratios[mid])), cost.num_classes)) <= target:
            high = mid
        else:
            low = mid + 1
    return gone(float(ratios[low]))


def _global(fams: Sequence[Family], cost: CostModel, start: float, target: float, per_cost: bool) -> list[int]:
    gone = [0] * len(fams)
    rounds = _ROUNDS if per_cost else 1  # importance alone does not change on the way
    for t in range(1, rounds + 1):
        goal = start + (target - start) * t / rounds
        price = cost.marginal(_mask(fams, gone, cost.num_classes)).clamp(min=1e-12)
        price = price if per_cost else torch.ones_like(price)
        owner, upto, density = _units(fams, gone, price)
        rank = torch.argsort(density, stable=True)
        owner, upto = owner[rank], upto[rank]

        def after(n: int, owner: Tensor = owner, upto: Tensor = upto, gone: list[int] = gone) -> list[int]:
            reached = torch.tensor(gone).scatter_reduce(0, owner[:n], upto[:n], "amax")
            return [int(v) for v in reached]

        low, high = 0, len(owner)
        while low < high:
            mid = (low + high) // 2
            if cost.total(_mask(fams, after(mid), cost.num_classes)) <= goal:
                high = mid
            else:
                low = mid + 1
        gone = after(low)
    return gone


def _units(fams: Sequence[Family], gone: Sequence[int], price: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every step still open: its family, how many classes are gone after it, and its importance per unit of cost."""
    owners, uptos, densities = [], [], []
    for i, (f, g) in enumerate(zip(fams, gone, strict=True)):
        open_ = f.steps[f.steps > g]
        if not len(open_):
            continue
        edges = torch.cat([torch.tensor([g]), open_])
        pad = torch.zeros(1, dtype=torch.float64)
        score = torch.cat([pad, f.scores.cumsum(0)])[edges].diff()
        saved = torch.cat([pad, price[f.order].cumsum(0)])[edges].diff()
        owners.append(torch.full((len(open_),), i))
        uptos.append(open_)
        densities.append((score / saved).cummax(0).values)
    if not owners:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64)
    return torch.cat(owners), torch.cat(uptos), torch.cat(densities)


def _refill(fams: Sequence[Family], gone: list[int], cost: CostModel, target: float) -> list[int]:
    """Give back the most important last steps, one at a time, that still fit under the target."""
    gone = list(gone)
    blocked = [False] * len(fams)
    while True:
        price = cost.marginal(_mask(fams, gone, cost.num_classes))
        ranked = []
        for i, (f, g) in enumerate(zip(fams, gone, strict=True)):
            if g and not blocked[i]:
                at = int((f.steps < g).sum())
                before = int(f.steps[at - 1]) if at else 0
                saved = float(price[f.order[before:g]].sum()) or 1e-12
                ranked.append((-float(f.scores[before:g].sum()) / saved, i, before))
        for _, i, before in sorted(ranked):
            trial = [*gone[:i], before, *gone[i + 1 :]]
            if cost.total(_mask(fams, trial, cost.num_classes)) <= target:
                gone = trial
                break
            blocked[i] = True
        else:
            return gone
