"""Open what MODEL names on the command line: a specification, or a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gossamer.errors import SourceError, UsageError

if TYPE_CHECKING:
    from gossamer.sources import LoadedModel

Inputs = tuple[torch.Tensor, ...] | dict[str, torch.Tensor]


def is_run(text: str) -> bool:
    """Whether ``text`` names an existing folder."""
    return Path(text).is_dir()


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """``"1,3,224,224"`` as a shape."""
    if text is None:
        return None
    try:
        shape = tuple(int(t) for t in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input {text!r} is not a shape: write for example 1,3,224,224")
    return shape


def open_model(text: str, *, weights: Path | None = None, shape: str | None = None) -> tuple[nn.Module, Inputs]:
    """The network that ``text`` names, and inputs for it."""
    if not is_run(text):
        from gossamer.sources import load_model

        loaded = load_model(text, weights=weights)
        return loaded.model, inputs_for(loaded, shape)
    from gossamer.plan import Plan
    from gossamer.run_folder import load

    if weights is not None:
        raise UsageError("--weights goes with a model specification; a run folder has weights of its own")
    wanted = parse_shape(shape)
    network = load(text)
    return network, Plan.load(Path(text) / "plan.json").example_inputs() if wanted is None else noise(wanted)


def inputs_for(loaded: LoadedModel, shape: str | None) -> Inputs:
    """Inputs of the shape asked for, or else of the network's own."""
    wanted = parse_shape(shape)
    if wanted is not None:
        return noise(wanted)
    if loaded.example_inputs is not None:
        inputs: Inputs = loaded.example_inputs
        return inputs
    if loaded.input_shape is None:
        raise SourceError(f"{loaded.spec} does not say its input shape: give --input, for example 1,3,224,224")
    return noise(loaded.input_shape)


def noise(shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """One input of normal noise, always the same."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)
