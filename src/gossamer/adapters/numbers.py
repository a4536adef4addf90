"""Numbers that Python code passes to torch: sizes of a view, bounds of a slice, a scale. They are what a pruned network may have to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

NUMBERED = frozenset(
    "view reshape expand unflatten broadcast_to repeat split split_with_sizes tensor_split narrow __getitem__ __setitem__ "
    "zeros ones full empty new_zeros new_ones new_full new_empty rand randn "
    "mul multiply div divide true_divide __mul__ __rmul__ __truediv__ __rtruediv__ __div__ mul_ div_ __imul__ __itruediv__ "
    "scaled_dot_product_attention layer_norm group_norm baddbmm linear einsum tensordot matmul __matmul__ __rmatmul__".split()
)
"""Names of the functions that are looked at."""


def _walk(value: Any, change: Callable[[Any], Any]) -> Any:
    kind = type(value)
    if isinstance(value, tuple | list):
        parts = [_walk(v, change) for v in value]
        return kind(*parts) if hasattr(value, "_fields") else tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, dict):
        return {k: _walk(v, change) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(change(value.start), change(value.stop), change(value.step))
    return change(value)


def numbers_in(args: Any, kwargs: Any) -> list[Any]:
    """Every leaf of a call's arguments that could be a number, in order; None where it is something else.

    Examples:
        >>> numbers_in((None, 2, (3, -1)), {"scale": 0.5})
        [None, 2, 3, -1, 0.5]
    """
    leaves: list[Any] = []

    def note(leaf: Any) -> Any:
        number = isinstance(leaf, int | float) and not isinstance(leaf, bool)
        leaves.append(leaf if number else None)
        return leaf

    _walk((args, kwargs), note)
    return leaves


def with_numbers(args: Any, kwargs: Any, ratios: Mapping[int, tuple[float, float]]) -> tuple[Any, Any]:
    """A call's arguments with some leaves multiplied by a ratio.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        ratios: leaf position (as `numbers_in` counts) -> numerator and denominator; whole numbers stay whole.

    Examples:
        >>> with_numbers((None, 2, 12, 64), {}, {2: (6, 12)})
        ((None, 2, 6, 64), {})
    """
    at = -1

    def change(leaf: Any) -> Any:
        nonlocal at
        at += 1
        if at not in ratios or leaf is None:
            return leaf
        up, down = ratios[at]
        if isinstance(leaf, float):
            return leaf * up / down
        return leaf * int(up) // int(down)

    changed: tuple[Any, Any] = _walk((args, kwargs), change)
    return changed
