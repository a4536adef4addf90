"""Open what MODEL names on the command line: a specification, or a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.errors import SourceError, UsageError, near


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


def open_model(
    text: str, *, weights: Path | None = None, shape: str | None = None
) -> tuple[nn.Module, tuple[torch.Tensor, ...] | dict[str, torch.Tensor]]:
    """The network that ``text`` names, and inputs for it."""
    wanted = parse_shape(shape)
    generator = torch.Generator().manual_seed(0)
    if is_run(text):
        from gossamer.plan import Plan
        from gossamer.run_folder import load

        if weights is not None:
            raise UsageError("--weights goes with a model specification; a run folder has weights of its own")
        network = load(text)
        inputs = Plan.load(Path(text) / "plan.json").example_inputs()
    else:
        from gossamer.sources import load_model

        loaded = load_model(text, weights=weights)
        network = loaded.model
        if wanted is None and loaded.input_shape is None:
            raise SourceError(f"{text} does not say its input shape: give --input, for example 1,3,224,224")
        inputs = (torch.randn(loaded.input_shape, generator=generator),) if loaded.input_shape else ()
        if loaded.example_inputs is not None:
            inputs = loaded.example_inputs
    if wanted is not None:
        inputs = (torch.randn(wanted, generator=generator),)
    return network, inputs


def bench_artefacts(texts: list[str], *, shape: str | None) -> tuple[list[Any], Any, list[str]]:
    """Artefacts for `gossamer.benchmark`: .onnx files and runs as paths, specifications as networks."""
    opened: list[Any] = []
    inputs: Any = None
    for text in texts:
        path = Path(text)
        if path.suffix == ".onnx":
            if not path.is_file():
                files = [str(p) for p in path.parent.glob("*.onnx")] if path.parent.is_dir() else []
                raise SourceError(f"no file {path}{near(text, files)}")
            opened.append(path)
        elif is_run(text):
            if not (path / "model.onnx").exists():
                raise SourceError(f"{path} holds no model.onnx: is it a finished run?")
            opened.append(path)
        else:
            network, found = open_model(text, shape=shape)
            opened.append(network)
            inputs = found if inputs is None else inputs
    wanted = parse_shape(shape)
    if wanted is not None:
        inputs = (torch.randn(wanted, generator=torch.Generator().manual_seed(0)),)
    return opened, inputs, texts


def sparse_of(artefact: Any, *, threads: int) -> Any:
    """Sparse kernels timed on the linear layers of what is benchmarked; a file of ONNX operations has none."""
    from gossamer.profiling import sparse_kernels

    if isinstance(artefact, Path) and artefact.suffix == ".onnx":
        raise SourceError(f"--sparse-kernels needs a network, and {artefact} is a file: name a model or a run folder first")
    return sparse_kernels(open_model(str(artefact))[0] if isinstance(artefact, Path) else artefact, threads=threads)
