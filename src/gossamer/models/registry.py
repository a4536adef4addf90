"""Names of gossamer's own networks, as ``gossamer:NAME`` in a model specification."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from gossamer.errors import SourceError, near
from gossamer.models.mobilenet import mobilenet_v2
from gossamer.models.resnet import resnet8

MODELS: dict[str, Callable[..., nn.Module]] = {"mobilenet_v2": mobilenet_v2, "resnet8": resnet8}
"""Name -> the function that builds it; all its arguments are keyword-only and have defaults."""


def build(name: str, **options: Any) -> nn.Module:
    """Build one of gossamer's own networks.

    Example:
        >>> build("resnet8", width=8, in_channels=1).head
        Linear(in_features=32, out_features=10, bias=True)

    Args:
        name: a key of `MODELS`.
        **options: arguments of that function; names and types are checked.

    Returns:
        The network with random weights.

    Raises:
        SourceError: an unknown name or option (near names are listed), or a value that does not fit.
    """
    if name not in MODELS:
        raise SourceError(f"gossamer has no model {name!r}, known are {', '.join(sorted(MODELS))}{near(name, MODELS)}")
    known = inspect.signature(MODELS[name]).parameters
    for option, value in options.items():
        if option not in known:
            raise SourceError(f"gossamer:{name} has no option {option!r}, known are {', '.join(known)}{near(option, known)}")
        kind = type(known[option].default)
        fits = isinstance(value, bool) == (kind is bool) and isinstance(value, (int, float) if kind is float else kind)
        if not fits:
            raise SourceError(
                f"gossamer:{name}: {option}={value!r} is not of type {kind.__name__} (its default is {known[option].default})"
            )
    return MODELS[name](**options)
