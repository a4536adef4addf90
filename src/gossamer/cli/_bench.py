"""What `bench` compares: names resolved to models, run folders and files; weights and data for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.cli._models import inputs_for, is_run, noise, open_model, parse_shape
from gossamer.errors import NothingToDo, SourceError, UsageError, near

FILES = (".onnx", ".pte")


@dataclass(frozen=True)
class Contestant:
    """One thing to compare.

    Attributes:
        name: for the tables: the specification in full, or the path.
        artefact: what `gossamer.profiling.side_by_side` takes.
        inputs: of a network, or None.
        transform: how its images are prepared, where that is known.
        trained: False where its weights are known to be random.
    """

    name: str
    artefact: Any
    inputs: Any = None
    transform: Any = None
    trained: bool = True


def contestants(texts: list[str], *, weights: list[str], shape: str | None) -> list[Contestant]:
    """Open what is named: .onnx and .pte files and runs as paths, specifications and bare names of models as networks."""
    from gossamer.sources import load_model

    names = [full_name(t) for t in texts]
    files = _weights(weights, texts, names)
    opened = []
    for name in names:
        path = Path(name)
        if path.suffix in FILES:
            if not path.is_file():
                siblings = [str(p) for p in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
                raise SourceError(f"no file {path}{near(name, siblings)}")
            opened.append(Contestant(name, path))
        elif is_run(name):
            if not (path / "model.onnx").exists():
                raise SourceError(f"{path} holds no model.onnx: is it a finished run?")
            opened.append(Contestant(name, path))
        else:
            loaded = load_model(name, weights=files.get(name))
            opened.append(Contestant(name, loaded.model, inputs_for(loaded, shape), loaded.transform, loaded.pretrained))
    return opened


def full_name(text: str) -> str:
    """A file or a folder as it is; a bare name as the model it stands for."""
    from gossamer.sources import complete

    if Path(text).suffix in FILES or ":" in text:
        return text
    if not is_run(text):
        return complete(text)
    if "/" not in text:
        try:
            model = complete(text)
        except SourceError:
            return text
        raise SourceError(f"{text!r} is a folder here and {model} a model: write ./{text} or {model}")
    return text


def inputs_of(entered: list[Contestant], shape: str | None) -> Any:
    """The inputs that all of them are timed on: of the shape asked for, or those of the first network."""
    wanted = parse_shape(shape)
    if wanted is not None:
        return noise(wanted)
    return next((c.inputs for c in entered if c.inputs is not None), None)


class Readers:
    """Labelled batches for each contestant, prepared as it wants its images; none for random weights.

    Attributes:
        notes: who is not evaluated, and why.
    """

    def __init__(self, entered: list[Contestant], data: str) -> None:
        from gossamer.sources import load_data

        load_data(data)
        self.entered, self.data = entered, data
        self.notes = [f"{c.name}: no accuracy, its weights are random; give --weights {c.name}=FILE" for c in entered if not c.trained]
        if len(self.notes) == len(entered):
            raise NothingToDo(f"--data {data} has nothing to evaluate: all weights are random; give --weights {entered[0].name}=FILE")

    def __call__(self, number: int) -> Iterable[Any] | None:
        from gossamer.sources import load_data

        contestant = self.entered[number]
        if not contestant.trained:
            return None
        return load_data(self.data, transform=contestant.transform).loader("val")


def sparse_of(artefact: Any, *, threads: int) -> Any:
    """Sparse kernels timed on the linear layers of what is benchmarked; a file of ONNX operations has none."""
    from gossamer.profiling import sparse_kernels

    if isinstance(artefact, Path) and artefact.suffix in FILES:
        raise SourceError(f"--sparse-kernels needs a network, and {artefact} is a file: name a model or a run folder first")
    return sparse_kernels(open_model(str(artefact))[0] if isinstance(artefact, Path) else artefact, threads=threads)


def _weights(given: list[str], texts: list[str], names: list[str]) -> dict[str, Path]:
    """Files of weights by the full name of the model they are for."""
    models = [n for n in names if ":" in n and not is_run(n)]
    found = {}
    for text in given:
        name, equals, file = text.rpartition("=")
        if not equals and len(models) == 1:
            name = models[0]
        full = dict(zip(texts, names, strict=True)).get(name, name)
        if full not in models:
            raise UsageError(
                f"--weights {text!r}: write NAME=FILE with the name of a model that is compared{near(name, [*texts, *models])}"
            )
        if full in found:
            raise UsageError(f"--weights names {name} twice")
        found[full] = Path(file)
    return found
