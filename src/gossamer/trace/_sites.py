"""Call sites: where Python code passes numbers to torch, in the order in which it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.overrides import TorchFunctionMode

from gossamer.adapters import NUMBERED, numbers_in, sets_scale


@dataclass(frozen=True, slots=True)
class Site:
    """One call of a torch function with numbers in it.

    Attributes:
        path: innermost module whose forward was running.
        call: name of the function.
        ordinal: calls of that name before this one in that module's forward, submodules included.
        leaves: the numbers among its arguments, as `gossamer.adapters.numbers_in` lists them; of an attention that derives its scale from
            the head size, the head size at the end.
    """

    path: str
    call: str
    ordinal: int
    leaves: tuple[Any, ...]


class Sites(TorchFunctionMode):
    """Calls ``before(name, args, kwargs)`` and ``after()`` around every numbered function; ``before`` may change the arguments."""

    def __init__(self, before: Callable[[str, Any, Any], tuple[Any, Any]], after: Callable[[], None]) -> None:
        super().__init__()
        self.before, self.after = before, after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in NUMBERED:
            return func(*args, **kwargs)
        args, kwargs = self.before(name, args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            self.after()


class Counter:
    """Counts numbered calls in every module that is running."""

    def __init__(self) -> None:
        self.running: list[tuple[str, dict[str, int]]] = [("", {})]

    @property
    def path(self) -> str:
        """The innermost module that is running."""
        return self.running[-1][0]

    def enter(self, path: str | None) -> str:
        """A module starts; one without a path of its own counts as part of the module around it."""
        self.running.append(self.running[-1] if path is None else (path, {}))
        return self.path

    def leave(self) -> None:
        """It ends."""
        if len(self.running) > 1:
            self.running.pop()

    def count(self, name: str, args: Any, kwargs: Any) -> Site:
        """The site of a call."""
        path, seen = self.running[-1]
        ordinal = seen.get(name, 0)
        for counts in {id(c): c for _, c in self.running}.values():
            counts[name] = counts.get(name, 0) + 1
        leaves = numbers_in(args, kwargs)
        if sets_scale(name, args, kwargs):
            leaves.append(int(args[0].shape[-1]))
        return Site(path, name, ordinal, tuple(leaves))
