"""Sizes that a module's code holds for itself: which numbers, in which calls, must change in a cut network.

One forward pass of the cut network finds all of them: at every call in which Python code passes numbers to torch, those that the trace
predicts take the place of those that the code passes, and what differed is noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from gossamer.adapters import SCALE, free_attention, numbers_in, sets_scale, with_numbers
from gossamer.plan import RescaleCall, SetAttribute
from gossamer.sources.batches import call
from gossamer.surgery.prediction import Prediction
from gossamer.surgery.replay import Check
from gossamer.trace import Site, Sites, Step, Trace, plain_forward

Number = int | float
Needed = dict[tuple[str, str, int], dict[int, tuple[Number, Number]]]
"""(module, call, ordinal) -> leaf -> (number it must be, number the code passes)."""

_SHAPES = frozenset("view reshape expand broadcast_to zeros ones full empty new_zeros new_ones new_full new_empty rand randn".split())
_SPLITS = frozenset("split split_with_sizes".split())
_SCALES = frozenset("mul multiply div divide true_divide rmul imul truediv rtruediv itruediv".split())
_SLICES = frozenset("__getitem__ __setitem__ narrow".split())


class _Stop(Exception):
    """The cut network does not call what the trace called."""


@dataclass
class Repair:
    """The numbers that each call site must pass once classes are gone."""

    traced: Trace
    predict: Prediction

    @cached_property
    def steps_of(self) -> dict[int, list[Step]]:
        """Operations of each call site."""
        found: dict[int, list[Step]] = {}
        for step in self.traced.steps:
            if step.site >= 0 and step.outputs:
                found.setdefault(step.site, []).append(step)
        return found

    def wanted(self, number: int) -> dict[int, Number]:
        """Leaf -> number it must be; only those that the trace says something about."""
        site, steps = self.traced.sites[number], self.steps_of.get(number, [])
        if not steps or not any(v is not None for v in site.leaves):
            return {}
        if site.call in _SLICES:
            return dict(self._slices(site, steps))
        if site.call in _SPLITS:
            return dict(self._split(site, steps[-1]))
        shape = self.predict.shapes(steps[-1])[0]
        old = steps[-1].shapes[0]
        if shape is None:
            return {}
        if site.call in _SHAPES:
            return _run(site.leaves, old, shape)
        if site.call == "unflatten":
            return _run(site.leaves, old, shape, first=2, at=site.leaves[1])
        if site.call == "layer_norm":
            return _run(site.leaves, old[-1:], shape[-1:])
        scales = site.call.strip("_") in _SCALES
        return {i: v for i, v in enumerate(site.leaves) if isinstance(v, float) or (isinstance(v, int) and scales)}

    def _split(self, site: Site, step: Step) -> Iterator[tuple[int, Number]]:
        dim = step.numbers[2] if len(step.numbers) > 2 else 0
        shapes = self.predict.shapes(step)
        if any(s is None for s in shapes):
            return
        sizes = [s[dim] for s in shapes if s is not None]
        given = step.numbers[1]
        if isinstance(given, int):
            yield from ((i, sizes[0]) for i, v in enumerate(site.leaves[:2]) if v == given and not isinstance(v, float))
            return
        yield from _run(site.leaves, tuple(given), tuple(sizes)).items()

    def _slices(self, site: Site, steps: Sequence[Step]) -> Iterator[tuple[int, Number]]:
        at = 0
        for step in steps:
            if step.op != "slice" or len(step.numbers) < 4 or not step.inputs:
                continue
            dim, start, end = step.numbers[1], step.numbers[2] or 0, step.numbers[3]
            stays = self.predict.along(step.inputs, dim)
            if stays is None:
                continue
            n, left = len(stays), int(stays.sum())
            bounds = []
            for bound in (start, n if end is None else min(end, n)):
                bound = max(bound + n if bound < 0 else bound, 0)
                bounds.append((bound, int(stays[:bound].sum())))
            for old, new in bounds:
                for i in range(at, len(site.leaves)):
                    value = site.leaves[i]
                    if isinstance(value, int) and value in (old, old - n) and value != 0:
                        yield i, (new if value > 0 else new - left)
                        at = i + 1
                        break

    def needed(self, model: nn.Module) -> tuple[Needed, int, bool]:
        """Run a cut network with every number put right: which had to be, the last call that it made, and whether it ran as predicted with none put right."""
        needed: Needed = {}
        number = -1
        check = Check(self.traced, self.predict, stops=False)

        def before(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
            nonlocal number
            number += 1
            check.at_site(name, args, kwargs)
            if number >= len(self.traced.sites) or self.traced.sites[number].call != name:
                raise _Stop
            site = self.traced.sites[number]
            if sets_scale(name, args, kwargs) and site.leaves[-1] != args[0].shape[-1]:
                needed[site.path, site.call, site.ordinal] = {SCALE: (int(args[0].shape[-1]), site.leaves[-1])}
            wanted = self.wanted(number)
            if not wanted:
                return args, kwargs
            now = numbers_in(args, kwargs)
            ratios = {
                i: (v, now[i])
                for i, v in wanted.items()
                if i < len(now) and now[i] is not None and now[i] not in (0, -1) and v != now[i] and v > 0
            }
            if not ratios:
                return args, kwargs
            needed[site.path, site.call, site.ordinal] = needed.get((site.path, site.call, site.ordinal), {}) | ratios
            return with_numbers(args, kwargs, ratios)

        as_predicted = False
        with plain_forward(model), free_attention(model), suppress(Exception):
            with Sites(before, check.off_site), check:
                call(model, self.traced.example_inputs)  # a failure is found again when the network is held against its trace
            as_predicted = check.complete()
        return needed, number, as_predicted and not needed


def _run(leaves: Sequence[Any], old: Sequence[int], new: Sequence[int], first: int = 0, at: Any = None) -> dict[int, Number]:
    """The first run of leaves that spells ``old`` (or -1 for one of its sizes), paired with ``new``; ``at``: the dimension where the run is."""
    for k in range(len(old), 0, -1):
        for start in range(first, len(leaves) - k + 1):
            places = [at if at >= 0 else at + len(old) - k + 1] if isinstance(at, int) else range(len(old) - k + 1) if first else [0]
            for a in places:
                run = leaves[start : start + k]
                if len(old[a : a + k]) == k and all(isinstance(v, int) and v in (-1, o) for v, o in zip(run, old[a : a + k], strict=True)):
                    return {start + i: new[a + i] for i, v in enumerate(run) if v != -1}
        if not first:
            break
    return {}


def call_edits(needed: Needed) -> list[RescaleCall]:
    """The numbers that must change, as edits."""
    return [
        RescaleCall(module=path, call=name, ordinal=ordinal, ratios=tuple((i, up, down) for i, (up, down) in ratios.items()))
        for (path, name, ordinal), ratios in needed.items()
    ]


def attribute_guesses(model: nn.Module, needed: Needed) -> list[list[SetAttribute]]:
    """Whole-number attributes that hold a number which must change: for each class and attribute, its new value in every module.

    Args:
        model: the cut network.
        needed: of it.
    """
    guesses: dict[tuple[type, str], dict[str, Number | None]] = {}
    for (path, _, _), ratios in needed.items():
        module = model.get_submodule(path)
        values = whole_numbers(module)
        for up, down in ratios.values():
            for name, value in values.items():
                if value == down and isinstance(up, int):
                    known = guesses.setdefault((type(module), name), {})
                    known[path] = up if known.get(path, up) == up else None
    return [
        [SetAttribute(module=path, name=name, value=int(v)) for path, v in found.items() if v is not None]
        for (_, name), found in guesses.items()
        if any(v is not None for v in found.values())
    ]


def whole_numbers(module: nn.Module) -> Mapping[str, int]:
    """Attributes of a module that could be sizes: whole numbers above 1 that belong to the module's own code."""
    return {n: v for n, v in vars(module).items() if type(v) is int and v > 1 and not n.startswith("_")}


def size(needed: Needed) -> int:
    """How many numbers must change."""
    return sum(len(r) for r in needed.values())
