"""The options of `gossamer.quantize`, checked before anything is computed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gossamer.errors import SelectorError, UsageError, near
from gossamer.quantization.allocation import check_average
from gossamer.quantization.edits import STEPS
from gossamer.quantization.observers import OBSERVERS
from gossamer.quantization.reconstruction import ROUNDINGS
from gossamer.quantization.target import PREFERENCES

GRANULARITIES = ("channel", "tensor")
CORRECTIONS = (True, False, "measured", "analytic")


@dataclass(frozen=True)
class Options:
    """What `gossamer.quantize` was asked for; UsageError where something is out of range."""

    weight_bits: int | Mapping[str, int]
    activation_bits: int | str
    average_bits: float | tuple[float, float] | None
    step: str
    granularity: str
    observer: str
    rounding: str
    equalize: bool
    bias_correction: bool | str
    prefer: str

    def __post_init__(self) -> None:
        widths = self.weight_bits if isinstance(self.weight_bits, Mapping) else {"": self.weight_bits}
        for pattern, bits in widths.items():
            if not _whole(bits) or not 2 <= bits <= 8:
                raise UsageError(f"weight_bits={bits!r}{f' for {pattern!r}' if pattern else ''}: give an integer from 2 to 8")
        if self.activation_bits not in ("auto", 16) and not (_whole(self.activation_bits) and 2 <= self.activation_bits <= 8):  # type: ignore[operator]
            raise UsageError(
                f"activation_bits={self.activation_bits!r}: give an integer from 2 to 8, 16, or 'auto' for 8 or 16 by sensitivity"
            )
        for name, known in (
            ("step", STEPS),
            ("granularity", GRANULARITIES),
            ("observer", OBSERVERS),
            ("rounding", ROUNDINGS),
            ("prefer", PREFERENCES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"{name}={value!r}: known are {', '.join(known)}{near(str(value), known)}")
        if self.bias_correction not in CORRECTIONS:
            raise UsageError(f"bias_correction={self.bias_correction!r}: known are True (measured), 'analytic' and False")
        if self.average_bits is not None:
            for average in self.average_bits if isinstance(self.average_bits, tuple | list) else (self.average_bits,):
                check_average(average)
            if self.weight_bits != 8:
                raise UsageError("give weight_bits or average_bits, not both: the average chooses each weight's bits")

    @property
    def averages(self) -> tuple[float | None, float | None]:
        """Average bits of weights and of activations."""
        if isinstance(self.average_bits, tuple | list):
            weights, activations = self.average_bits
            return weights, activations
        return self.average_bits, None

    @property
    def activation_width(self) -> int:
        """Bits of activations; until they are chosen, the average, and 8 for ``"auto"``."""
        average = self.averages[1]
        return round(average) if average is not None else self.activation_bits if isinstance(self.activation_bits, int) else 8

    def widths(self, names: Iterable[str]) -> dict[str, int]:
        """Bits of each weight: those of the first pattern that it matches, 8 where none does; the average, until they are chosen.

        SelectorError for a pattern that matches nothing.
        """
        names, (average, _) = list(names), self.averages
        if average is not None:
            return dict.fromkeys(names, round(average))
        if not isinstance(self.weight_bits, Mapping):
            return dict.fromkeys(names, self.weight_bits)
        for pattern in self.weight_bits:
            if not any(_matches(pattern, n) for n in names):
                raise SelectorError(f"weight_bits pattern {pattern!r} matches no weight{near(pattern, names)}")
        return {n: next((b for p, b in self.weight_bits.items() if _matches(p, n)), 8) for n in names}


def _matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition(".")[0], pattern) or name.startswith(pattern + ".")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
