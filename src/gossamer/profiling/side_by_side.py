"""Networks side by side: what they cost on paper, and what they take and are worth where they run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gossamer.errors import GossamerError, UsageError
from gossamer.profiling.accuracy import Accuracy, evaluate
from gossamer.profiling.artefacts import Artefact, check_runtime, resolve, unique
from gossamer.profiling.costs import profile
from gossamer.profiling.latency import Benchmark, Timing, benchmark, brought_inputs
from gossamer.profiling.memory import peak_activation_bytes
from gossamer.result import ExampleInputs, Profile


@dataclass(frozen=True)
class Side:
    """One artefact of a comparison.

    Attributes:
        timing: name, bytes on disk and latency.
        params: elements of all parameters; None for a file of ONNX operations.
        macs: multiply-adds of the batch that was timed; None for a file of ONNX operations.
        peak_activation_bytes: the largest set of live activations of that batch: in the file that ONNX Runtime ran, in its own types
            (`peak_activation_bytes`), elsewhere in torch; None for a file of ONNX operations.
        accuracy: top-1, of the artefact in the runtime; None where it was not measured.
    """

    timing: Timing
    params: int | None = None
    macs: int | None = None
    peak_activation_bytes: int | None = None
    accuracy: Accuracy | None = None


@dataclass(frozen=True)
class SideBySide:
    """Artefacts compared; prints as two tables: what they cost, and how long they take.

    Attributes:
        rows: one `Side` for each artefact, in the order given.
        benchmark: the run they were timed in.
        notes: what was not measured, and why.
    """

    rows: tuple[Side, ...]
    benchmark: Benchmark
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain data: that of the benchmark, with the other figures in its rows."""
        rows = []
        for row in self.rows:
            plain = asdict(row)
            rows.append(plain.pop("timing") | plain)
        return self.benchmark.to_json() | {"rows": rows, "notes": list(self.notes)}

    def __str__(self) -> str:
        from gossamer.report.compare import side_by_side_table

        return side_by_side_table(self)


def side_by_side(
    *artefacts: Any,
    example_inputs: ExampleInputs = None,
    data: Iterable[Any] | Callable[[int], Iterable[Any] | None] | None = None,
    runtime: str = "onnxruntime",
    threads: int = 1,
    runs: int | None = None,
    seconds: float = 2.0,
    names: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> SideBySide:
    """Compare artefacts: parameters, multiply-adds, activation memory, bytes on disk, latency, and accuracy where data is given.

    Examples:
        >>> import torch
        >>> from gossamer.models import mobilenet_v1, resnet8
        >>> image = (torch.zeros(1, 3, 32, 32),)
        >>> table = side_by_side(resnet8(), mobilenet_v1(small=True), example_inputs=image, runtime="torch", runs=5)
        >>> [row.params for row in table.rows]
        [78042, 4231976]

    Args:
        artefacts: as of `benchmark`: ``.onnx`` files, run folders, networks, `Result`s. Networks are exported once, and the file is what is
            weighed, timed and evaluated.
        example_inputs: as of `benchmark`.
        data: batches of inputs and labels, read once for each artefact; or a function that takes the artefact's number and returns its
            batches, None for an artefact that is not to be evaluated.
        runtime: as of `benchmark`.
        threads: for each operator, at least 1.
        runs: rounds; None for as many as fit in ``seconds`` for each artefact.
        seconds: time for each artefact.
        names: for the tables, one for each artefact.
        notes: to print below the tables.

    Returns:
        A `SideBySide`.

    Raises:
        UsageError: as of `benchmark`.
        SourceError: labels that do not fit the networks.
    """
    check_runtime(runtime)
    if not artefacts:
        raise UsageError("nothing to compare: pass .onnx files, run folders, networks or results")
    resolved = [resolve(a) for a in artefacts]
    given = brought_inputs(resolved, example_inputs)
    shown = list(names) if names is not None else unique([a.name for a in resolved])
    if len(shown) != len(resolved):
        raise UsageError(f"{len(shown)} names for {len(resolved)} artefacts")
    with tempfile.TemporaryDirectory(prefix="gossamer-") as place:
        ready = [
            thing if runtime == "torch" else a.exported(Path(place), given, runtime) for a, thing in zip(resolved, artefacts, strict=True)
        ]
        timed = benchmark(*ready, example_inputs=given, runtime=runtime, threads=threads, runs=runs, seconds=seconds, names=shown)
        peaks = [_peak(a, thing, given, runtime) for a, thing in zip(resolved, ready, strict=True)]
        accuracies = []
        for i, artefact in enumerate(ready):
            batches = data(i) if callable(data) else data
            found = None if batches is None else evaluate(artefact, batches, runtime=runtime, threads=threads, example_inputs=given)
            accuracies.append(found.accuracy if found is not None else None)
    rows, said = [], list(notes)
    for artefact, timing, peak, accuracy in zip(resolved, timed.rows, peaks, accuracies, strict=True):
        costs, why = _costs(artefact, given)
        if costs is None:
            rows.append(Side(timing, accuracy=accuracy))
            said.append(f"{timing.name}: parameters and MACs are not known ({why})")
        else:
            rows.append(Side(timing, costs.params, costs.macs, costs.peak_activation_bytes if peak is None else peak, accuracy))
    return SideBySide(tuple(rows), timed, tuple(said))


def _peak(artefact: Artefact, file: Any, inputs: ExampleInputs, runtime: str) -> int | None:
    """Of the file that stands for a network in ONNX Runtime: what runs in torch for a quantised one is its simulation in float."""
    return (
        peak_activation_bytes(file, inputs)
        if runtime == "onnxruntime" and (artefact.model is not None or artefact.folder is not None) and inputs is not None
        else None
    )


def _costs(artefact: Artefact, inputs: ExampleInputs) -> tuple[Profile | None, str]:
    """What its network costs, or None and the reason."""
    if artefact.model is None and artefact.folder is None:
        return None, "a file of ONNX operations" if not artefact.is_pte else "a file for ExecuTorch"
    try:
        return profile(artefact.module(), inputs), ""
    except GossamerError as e:
        return None, " ".join(str(e).split())
