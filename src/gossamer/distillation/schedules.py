"""Weights and temperatures that change over a training: functions of how much of it is done, and hence the same after a resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gossamer.errors import UsageError


@dataclass(frozen=True)
class Linear:
    """From ``start`` to ``end`` in a straight line over the first ``until`` of the training, then constant.

    Examples:
        >>> [Linear(4.0, 1.0, until=0.5)(p) for p in (0.0, 0.25, 0.5, 1.0)]
        [4.0, 2.5, 1.0, 1.0]
    """

    start: float
    end: float
    until: float = 1.0

    def __post_init__(self) -> None:
        _check(self.until)

    def __call__(self, done: float) -> float:
        return self.start + (self.end - self.start) * min(1.0, done / self.until)


@dataclass(frozen=True)
class Cosine:
    """From ``start`` to ``end`` along half a cosine over the first ``until`` of the training, then constant.

    Examples:
        >>> [round(Cosine(1.0, 0.0)(p), 3) for p in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """

    start: float
    end: float
    until: float = 1.0

    def __post_init__(self) -> None:
        _check(self.until)

    def __call__(self, done: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * min(1.0, done / self.until)))


Scheduled = float | Callable[[float], float]
"""A number, or a function from the part of the training that is done, in [0, 1], to a number."""


def value_at(value: Any, done: float) -> Any:
    """A schedule's value where ``done`` of the training is done; anything else as it is.

    Examples:
        >>> value_at(Linear(0.0, 1.0), 0.25), value_at(3.0, 0.25)
        (0.25, 3.0)
    """
    return value(done) if callable(value) else value


def _check(until: float) -> None:
    if not 0 < until <= 1:
        raise UsageError(f"until={until}: a schedule ends after a part of the training in (0, 1]")
