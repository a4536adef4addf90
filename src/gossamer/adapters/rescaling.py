"""Modules whose code holds sizes of its own: while their forward runs, chosen numbers in chosen calls are rescaled.

A size is kept as a ratio, not as a value, because code often multiplies it with the batch (``view(batch * heads, ...)``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from gossamer.adapters.numbers import NUMBERED, with_numbers

Ratios = dict[int, tuple[float, float]]
_TABLE = "_gossamer_calls"


SCALE = -1
"""Position that stands for the head size from which an attention derives its scale."""


def sets_scale(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is an attention that derives its scale from the size of its heads."""
    return name == "scaled_dot_product_attention" and kwargs.get("scale") is None and len(args) > 0 and hasattr(args[0], "shape")


class _Rescaling(TorchFunctionMode):
    """Counts the calls of each numbered function, and rescales those in the table."""

    def __init__(self, table: Mapping[tuple[str, int], Ratios]) -> None:
        super().__init__()
        self.table = table
        self.seen: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in NUMBERED:
            ordinal = self.seen.get(name, 0)
            self.seen[name] = ordinal + 1
            ratios = self.table.get((name, ordinal))
            if ratios is not None:
                args, kwargs = with_numbers(args, kwargs, ratios)
                if SCALE in ratios and sets_scale(name, args, kwargs):
                    up, down = ratios[SCALE]
                    kwargs = {**kwargs, "scale": (args[0].shape[-1] * down / up) ** -0.5}
        return func(*args, **kwargs)


_SUBCLASSES: dict[type, type[nn.Module]] = {}


def _rescaled(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module class whose forward runs under `_Rescaling`."""
    if kind in _SUBCLASSES:
        return _SUBCLASSES[kind]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Rescaling(self.__dict__[_TABLE]):
            return kind.forward(self, *args, **kwargs)

    body = {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__, "_rescaled": True}
    made: type[nn.Module] = type(kind.__name__, (kind,), body)
    _SUBCLASSES[kind] = made
    return made


def rescale_calls(module: nn.Module, call: str, ordinal: int, ratios: Mapping[int, tuple[float, float]]) -> None:
    """Rescale numbers in the ``ordinal``-th call of one function, each time the module's forward runs.

    Examples:
        >>> import torch
        >>> class Heads(nn.Module):
        ...     def forward(self, x):
        ...         return x.view(x.shape[0], 4, 8)
        >>> heads = Heads()
        >>> rescale_calls(heads, "view", 0, {2: (2, 4)})
        >>> heads(torch.zeros(5, 16)).shape
        torch.Size([5, 2, 8])

    Args:
        module: changed in place; it stays an instance of its class.
        call: name of the torch function, ``"view"``, ``"__getitem__"``, ...
        ordinal: calls of that name before this one in the module's forward, submodules included.
        ratios: position among the call's leaves (or `SCALE`) -> numerator and denominator; multiplied with what was set before.
    """
    if not getattr(type(module), "_rescaled", False):
        module.__class__ = _rescaled(type(module))
        module.__dict__[_TABLE] = {}
    table = dict(module.__dict__[_TABLE])
    merged = dict(table.get((call, ordinal), {}))
    for leaf, (up, down) in ratios.items():
        known = merged.get(int(leaf), (1, 1))
        merged[int(leaf)] = (known[0] * up, known[1] * down)
    table[call, ordinal] = merged
    module.__dict__[_TABLE] = table
