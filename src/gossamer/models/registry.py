"""Names of gossamer's own networks, as ``gossamer:NAME`` in a model specification."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from gossamer.errors import SourceError, near
from gossamer.models.densenet import densenet121, densenet_bc100
from gossamer.models.ghostnet import ghostnet
from gossamer.models.mobilenet import mobilenet_v1, mobilenet_v2
from gossamer.models.mobilenet_v3 import mobilenet_v3_large, mobilenet_v3_small
from gossamer.models.resnet import resnet8, resnet18, resnet20, resnet34, resnet50
from gossamer.models.shufflenet import shufflenet_v2
from gossamer.models.squeezenet import squeezenet1_0, squeezenet1_1

MODELS: dict[str, Callable[..., nn.Module]] = {
    "densenet121": densenet121,
    "densenet_bc100": densenet_bc100,
    "ghostnet": ghostnet,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3_large": mobilenet_v3_large,
    "mobilenet_v3_small": mobilenet_v3_small,
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "shufflenet_v2": shufflenet_v2,
    "squeezenet1_0": squeezenet1_0,
    "squeezenet1_1": squeezenet1_1,
}
"""Name -> the function that builds it; all its arguments are keyword-only and have defaults."""


def input_side(name: str, **options: Any) -> int:
    """Height and width of the images that one of gossamer's own networks is made for: 32 with a small-image stem, else 224.

    Examples:
        >>> input_side("resnet18"), input_side("resnet18", small=True), input_side("resnet8")
        (224, 32, 32)
    """
    return 32 if options.get("small", inspect.signature(MODELS[name]).parameters["small"].default) else 224


def build(name: str, **options: Any) -> nn.Module:
    """Build one of gossamer's own networks.

    Examples:
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
