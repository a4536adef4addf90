"""What holds, moves or projects zeros after every optimiser step of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gossamer.errors import UsageError, near
from gossamer.projections import l0_project, largest
from gossamer.sparsity.selection import Pattern, select
from gossamer.sparsity.sparsify import chosen_weights, project_l1, radius

SCHEDULES = ("one_shot", "iterative", "cubic")
"""Names of the schedules: all at the start, in equal parts, most early."""
REGROWTH = ("gradient", "random")
"""Where connections grow back: where the loss's gradient is largest, or anywhere."""


class Sparsifier(nn.Module):
    """Holds masks while a network trains and changes them on a schedule; pass it to `gossamer.fit` as ``after_step``.

    Examples:
        >>> net = nn.Linear(8, 4)
        >>> hold = Sparsifier(net, sparsity=0.5, steps=4, updates=2, end=1.0)
        >>> for _ in range(4):
        ...     hold(net)
        >>> int((net.weight == 0).sum())
        16

    Its state (masks, steps) is part of the checkpoints of `gossamer.fit`.

    Args:
        model: names the weights; not changed.
        sparsity: fraction of zeros at the end, in (0, 1).
        steps: optimiser steps of the whole training.
        schedule: ``"one_shot"`` (the zeros of ``model`` are held from the start), ``"iterative"`` or ``"cubic"``.
        begin, end: between which fractions of the steps masks change.
        updates: how often they change. Few large changes cost accuracy at 95% zeros and more; 20 in place of 100 lost four points at 98%.
        regrow: ``"gradient"`` (RigL) or ``"random"`` (SET): at every update the smallest of the weights that stay make room for others.
        regrow_fraction: of the weights that stay, how many at the first update; falls to 0 as half a cosine.
        scope: ``"global"``, ``"layer"`` or ``"row"``.
        pattern: blocks, ``"4x1"``; with ``"one_shot"`` alone, N:M too.
        ignore: patterns of module paths or tensor names that stay dense.
        seed: of random regrowth.

    Raises:
        UsageError: an argument outside its range.
        SelectorError: an ``ignore`` pattern matches no weight.

    Source: schedule: Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878; regrowth: Evci et al., "Rigging the Lottery", ICML 2020.
    """

    count: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float | None,
        steps: int,
        schedule: str = "cubic",
        begin: float = 0.0,
        end: float = 0.5,
        updates: int = 100,
        regrow: str | None = None,
        regrow_fraction: float = 0.1,
        scope: str = "global",
        pattern: str | None = None,
        ignore: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._pattern = Pattern.parse(pattern) if pattern is not None else None
        _check(sparsity, schedule, begin, end, updates, regrow, regrow_fraction, self._pattern)
        weights, _ = chosen_weights(model, ignore, self._pattern)
        self._names = tuple(weights)
        self._sparsity, self._scope, self._regrow, self._regrow_fraction = sparsity or 0.0, scope, regrow, regrow_fraction
        self._seed = seed
        first, last = begin * steps, max(end * steps, 1)
        moments = [max(1, round(first + (last - first) * i / updates)) for i in range(1, updates + 1)]
        parts = [i / updates for i in range(1, updates + 1)]
        if schedule == "one_shot":
            self._plan = {m: (1.0, t) for m, t in zip(moments, parts, strict=True)} if regrow else {}
        else:
            self._plan = {m: (1 - (1 - t) ** 3 if schedule == "cubic" else t, t) for m, t in zip(moments, parts, strict=True)}
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        for i, p in enumerate(weights.values()):
            dense = torch.ones_like(p, dtype=torch.bool, memory_format=torch.preserve_format)
            self.register_buffer(f"mask_{i}", p.detach() != 0 if schedule == "one_shot" else dense)

    def masks(self) -> dict[str, Tensor]:
        """Name -> mask of the weights that stay, as they are now."""
        return {n: getattr(self, f"mask_{i}") for i, n in enumerate(self._names)}

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """After an optimiser step: change the masks where the schedule says so, then set what they leave out to zero."""
        self.count += 1
        parameters = dict(model.named_parameters())
        weights = {n: parameters[n] for n in self._names}
        now = self._plan.get(int(self.count))
        if now is not None:
            self._change(weights, *now)
        for i, p in enumerate(weights.values()):
            kept = getattr(self, f"mask_{i}")
            if kept.device != p.device or kept.stride() != p.stride():
                kept = torch.empty_like(p, dtype=torch.bool).copy_(kept)
                setattr(self, f"mask_{i}", kept)
            p.detach().mul_(kept)

    def _change(self, weights: dict[str, nn.Parameter], part: float, t: float) -> None:
        size = {n: p.detach().abs().float() for n, p in weights.items()}
        kept = select(size, sparsity=self._sparsity * part, scope=self._scope, pattern=self._pattern)
        fraction = self._regrow_fraction / 2 * (1 + math.cos(math.pi * t))
        if self._regrow is not None and fraction > 0 and t < 1:
            kept = self._regrown(weights, size, kept, fraction)
        for i, name in enumerate(self._names):
            setattr(self, f"mask_{i}", kept[name])

    def _regrown(
        self, weights: dict[str, nn.Parameter], size: dict[str, Tensor], kept: dict[str, Tensor], fraction: float
    ) -> dict[str, Tensor]:
        """Within every tensor, drop the smallest of the kept and grow as many where the gradient (or chance) says so."""
        out = {}
        generator = torch.Generator().manual_seed(self._seed + int(self.count))
        for name, p in weights.items():
            mask = kept[name].reshape(-1)
            stay = int(mask.sum())
            moved = min(round(fraction * stay), mask.numel() - stay)
            if self._regrow == "random":
                wish = torch.rand(mask.numel(), generator=generator).to(mask.device)
            elif p.grad is None:
                raise UsageError("regrow='gradient' needs gradients after the step: not with optimizer_in_backward")
            else:
                wish = p.grad.abs().reshape(-1).float()
            strong = largest(torch.where(mask, size[name].reshape(-1), -1.0)[None], stay - moved)[0]
            grown = largest(torch.where(strong, -1.0, wish)[None], moved)[0]
            out[name] = (strong | grown).reshape(p.shape)
        return out


class Projection:
    """Projects weights on an L0 or L1 ball; pass it to `gossamer.fit` as ``after_step`` for projected gradient descent.

    Examples:
        >>> net = nn.Linear(8, 4)
        >>> with torch.no_grad():
        ...     Projection(net, l0=10)(net)
        >>> int((net.weight != 0).sum())
        10

    Args:
        model: names the weights; a percentage is of its magnitudes.
        l0: how many weights stay in each tensor, output channel, or in all (scope).
        l1: largest sum of magnitudes, or a percentage of the present one.
        scope: ``"layer"``, ``"row"`` or ``"global"``.
        ignore: patterns of module paths or tensor names that stay dense.
    """

    def __init__(
        self, model: nn.Module, *, l0: int | None = None, l1: float | str | None = None, scope: str = "layer", ignore: Sequence[str] = ()
    ) -> None:
        if (l0 is None) == (l1 is None):
            raise UsageError("give exactly one of l0 and l1")
        weights, _ = chosen_weights(model, ignore, None)
        self._names, self._l0, self._scope = tuple(weights), l0, scope
        self._radii: dict[str, float] = {}
        if l1 is not None:
            sums = {n: float(p.detach().abs().sum(dtype=torch.float64)) for n, p in weights.items()}
            if scope == "global":
                self._radii = dict.fromkeys(weights, radius(l1, sum(sums.values())))
            else:
                self._radii = {n: radius(l1, s / (len(weights[n]) if scope == "row" else 1)) for n, s in sums.items()}

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        """Project, in place."""
        parameters = dict(model.named_parameters())
        weights = {n: parameters[n].detach() for n in self._names}
        if self._l0 is not None and self._scope == "global":
            new = dict(zip(weights, l0_project(list(weights.values()), self._l0), strict=True))
        elif self._l0 is not None:
            new = {n: l0_project(w, self._l0, dim=0 if self._scope == "row" else None) for n, w in weights.items()}
        elif self._scope == "global":
            new = project_l1(weights, next(iter(self._radii.values())), "global")
        else:
            new = {n: project_l1({n: w}, self._radii[n], self._scope)[n] for n, w in weights.items()}
        for name, w in new.items():
            weights[name].copy_(w + 0.0)


def _check(
    sparsity: float | None,
    schedule: str,
    begin: float,
    end: float,
    updates: int,
    regrow: str | None,
    regrow_fraction: float,
    pattern: Pattern | None,
) -> None:
    if schedule not in SCHEDULES:
        raise UsageError(f"schedule={schedule!r}: known are {', '.join(SCHEDULES)}{near(str(schedule), SCHEDULES)}")
    if regrow is not None and regrow not in REGROWTH:
        raise UsageError(f"regrow={regrow!r}: known are {', '.join(REGROWTH)}{near(str(regrow), REGROWTH)}")
    regular = pattern is not None and pattern.block is None
    if regular and (schedule != "one_shot" or regrow is not None):
        raise UsageError("an N:M pattern goes with schedule='one_shot', without regrowth: it has no fraction that could rise")
    if regrow is not None and pattern is not None:
        raise UsageError("regrowth moves single weights: not with a pattern")
    if not regular and schedule != "one_shot" and (sparsity is None or not 0 < sparsity < 1):
        raise UsageError(f"sparsity={sparsity}: the fraction of zeros at the end lies in (0, 1)")
    if regrow is not None and sparsity is None:
        raise UsageError("regrowth needs a sparsity")
    if not 0 <= begin < end <= 1:
        raise UsageError(f"begin={begin}, end={end}: 0 <= begin < end <= 1, fractions of the training")
    if updates < 1 or not 0 < regrow_fraction <= 1:
        raise UsageError(f"updates={updates} is at least 1, regrow_fraction={regrow_fraction} lies in (0, 1]")
