"""Element by element: torch's kernels that write where they are told (not every ``out=`` does; tests watch the allocator)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or"})
_UNARY = (
    "abs", "ceil", "cos", "erf", "exp", "floor", "hardsigmoid", "hardswish", "log", "mish", "neg", "reciprocal", "round", "rsqrt", "sigmoid",
    "silu", "sin", "sqrt", "square", "tanh", "elu", "gelu", "hardshrink", "hardtanh", "leaky_relu", "softplus", "clamp", "logical_not",
)  # fmt: skip
_BINARY = ("maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or")


def _unary(name: str) -> Callable[..., Any]:
    """An operation with an ``out=`` that does not allocate, from ATen."""
    kernel = getattr(_aten, name).out
    return lambda out, *args, **kwargs: kernel(*args, **kwargs, out=out)


def _binary(name: str) -> Callable[..., Any]:
    """An operation of two tensors, with the same result type as torch's function."""
    kernel = getattr(torch, name)
    return lambda out, a, b: kernel(a, b, out=out)


def _sum(kernel: Callable[..., Tensor]) -> Callable[..., Any]:
    """A sum or difference, whose second operand may be scaled."""

    def run(out: Tensor, a: Any, b: Any, alpha: Any = 1, **kwargs: Any) -> None:
        alpha = kwargs.get("alpha", alpha)
        kernel(a, b, out=out) if alpha == 1 else kernel(a, b, alpha=alpha, out=out)

    return run


def _reversed(out: Tensor, a: Tensor, b: Any, alpha: Any = 1) -> None:
    """``b - alpha * a``."""
    torch.mul(a, -alpha, out=out)
    out.add_(b)


def _masked_fill(out: Tensor, x: Any, mask: Tensor, value: Any) -> None:
    """A copy with a value where the mask is set."""
    if not same_place(out, x):
        out.copy_(x)
    out.masked_fill_(mask, value)


def same_place(a: Tensor, b: Any) -> bool:
    """Whether two tensors are the same elements of the same memory."""
    return isinstance(b, Tensor) and a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.shape == b.shape


POINTWISE: dict[str, Callable[..., Any]] = {
    **{name: _unary(name) for name in _UNARY},
    **{name: _binary(name) for name in _BINARY},
    "add": _sum(torch.add),
    "sub": _sum(torch.sub),
    "rsub": _reversed,
    "mul": lambda out, a, b: torch.mul(a, b, out=out),
    "div": lambda out, a, b, rounding_mode=None: torch.div(a, b, rounding_mode=rounding_mode, out=out),
    "pow": lambda out, a, b: torch.pow(a, b, out=out),
    "relu": lambda out, x: _aten.clamp_min.out(x, 0, out=out),
    "clamp_min": lambda out, x, low: torch.clamp(x, min=low, out=out),
    "clamp_max": lambda out, x, high: torch.clamp(x, max=high, out=out),
    "addcmul": lambda out, x, a, b, value=1: torch.addcmul(x, a, b, value=value, out=out),
    "where": lambda out, mask, a, b: torch.where(mask, a, b, out=out),
    "masked_fill": _masked_fill,
}
"""Name of an operation -> ``run(out, *arguments)``; the output may lie on an argument of the same strides."""
