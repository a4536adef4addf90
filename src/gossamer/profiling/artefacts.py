"""What can be measured: ``.onnx`` and ``.pte`` files, run folders, networks and results, each opened as what a runtime takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gossamer.errors import RunFolderError, UsageError, near
from gossamer.plan import Plan
from gossamer.result import ExampleInputs, Result
from gossamer.run_folder import ONNX, PLAN, PTE, load, save_weights

Runtime = Literal["onnxruntime", "torch", "executorch"]
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "torch", "executorch")
"""Where an artefact can be run."""


@dataclass(frozen=True)
class Artefact:
    """One thing to measure.

    Attributes:
        name: for tables.
        file: its ``.onnx`` or ``.pte`` file, where there is one.
        folder: its run folder, where it is one.
        model: its network, where it is in memory.
        result: the `Result` that holds the network, where there is one.
        example_inputs: the inputs it brings, or None.
    """

    name: str
    file: Path | None = None
    folder: Path | None = None
    model: nn.Module | None = None
    result: Result | None = None
    example_inputs: ExampleInputs = None

    @property
    def is_pte(self) -> bool:
        """Whether it is a file for ExecuTorch."""
        return self.file is not None and self.file.suffix == ".pte"

    def exported(self, workplace: Path, example_inputs: ExampleInputs, runtime: str) -> Path:
        """Its file for a runtime; a network in memory is exported into ``workplace`` first, and for ExecuTorch that of a run folder too."""
        pte = runtime == "executorch"
        if self.file is not None and (self.is_pte or not pte):
            return self.file
        if pte and self.folder is not None and (self.folder / PTE).is_file():
            return self.folder / PTE
        if pte and self.folder is None and self.file is not None:
            raise UsageError(f"{self.name} is no .pte file: for executorch pass one, a network, a Result or a run folder")
        if self.folder is not None and not pte:
            raise RunFolderError(f"{self.folder} holds no {ONNX}: is the run finished?")
        if example_inputs is None and self.folder is not None:
            example_inputs = self.inputs()
        if example_inputs is None:
            raise UsageError(f"{self.name} is exported to be measured: pass example_inputs, for example (torch.zeros(1, 3, 224, 224),)")
        from gossamer.exporting import export

        network: Any = next((n for n in (self.result, self.model, self.folder) if n is not None), None)
        assert network is not None
        path = workplace / f"{len(list(workplace.iterdir()))}.{'pte' if pte else 'onnx'}"
        export(network, path, example_inputs=example_inputs)
        return path

    def module(self) -> nn.Module:
        """Its network; that of a run folder is loaded."""
        if self.model is not None:
            return self.model
        if self.folder is not None:
            return load(self.folder)
        raise UsageError(
            f"{self.name} runs in {'executorch' if self.is_pte else 'onnxruntime'} only; for torch pass a network, a Result or a run folder"
        )

    def inputs(self) -> ExampleInputs:
        """The inputs it brings: those of a result, or zeros of a run's recorded shapes; None where it brings none."""
        if self.folder is not None and (self.folder / PLAN).exists():
            return Plan.load(self.folder / PLAN).example_inputs() or None
        return self.example_inputs


def resolve(thing: Any) -> Artefact:
    """Find out what an artefact is, without opening it.

    Args:
        thing: the path of an ``.onnx`` or ``.pte`` file or of a run folder, a network, a `Result`, or an `Export`.

    Raises:
        UsageError: it is none of these, or the path does not exist.
    """
    if isinstance(thing, Result):
        return Artefact(thing.source or type(thing.model).__name__, model=thing.model, result=thing, example_inputs=thing.example_inputs)
    if isinstance(thing, nn.Module):
        return Artefact(type(thing).__name__, model=thing)
    if not isinstance(thing, str | os.PathLike):
        raise UsageError(f"an artefact is an .onnx or .pte file, a run folder, a torch.nn.Module or a Result, not {type(thing).__name__}")
    path = Path(os.fspath(thing))
    name = str(path) if not path.is_absolute() else str(Path(*path.parts[-2:]))
    if path.is_dir():
        file = path / ONNX
        return Artefact(name, file=file if file.is_file() else None, folder=path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"no file or run folder {path}{near(path.name, siblings)}")
    return Artefact(name, file=path)


def unique(names: Sequence[str]) -> list[str]:
    """The same names, repeated ones with a number.

    Examples:
        >>> unique(["Net", "Net", "b.onnx"])
        ['Net', 'Net#2', 'b.onnx']
    """
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out


def check_runtime(runtime: str) -> None:
    """UsageError for a runtime that is not known."""
    if runtime not in RUNTIMES:
        raise UsageError(f"unknown runtime {runtime!r}, known are {', '.join(RUNTIMES)}{near(runtime, RUNTIMES)}")


def weight_file_bytes(model: nn.Module, workplace: Path) -> int:
    """Bytes on disk of a network's weights as plain safetensors; a run folder keeps sparse and shared ones coded, in less."""
    return save_weights(model, workplace / "weights.safetensors").stat().st_size
