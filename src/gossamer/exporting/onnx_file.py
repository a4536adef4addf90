"""Writing a network as one file that has been run, and compared, before anyone gets to see it; an ONNX file is made here."""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gossamer.errors import ExportError, TraceError, UsageError, near
from gossamer.exporting.parity import Agreement, compare, other_batch, real_batches
from gossamer.exporting.rewrite import rewrite
from gossamer.exporting.runtime import run, session
from gossamer.exporting.translate import OPSET, is_quantized, to_onnx
from gossamer.result import Result
from gossamer.sources.batches import call, check_inputs
from gossamer.trace.capture import export_program

FORMATS = ("onnx", "executorch")
"""What `export` can write."""
_RUNTIME = {"onnxruntime": "ONNX Runtime", "executorch": "ExecuTorch"}
_LARGEST = 2**31 - 1  # bytes of one protobuf message


@dataclass(frozen=True)
class Export:
    """An exported file and how it agrees with the torch network.

    Attributes:
        path: the file; an `Export` can be used as a path itself.
        size_bytes: of the file, and of the weights beside it where there are some.
        opset: ONNX operator set; None where the file is none of ONNX.
        difference: largest relative difference ``max|torch - file| / max|torch|`` over all outputs compared.
        sqnr_db: of the file against the torch simulation, in decibels; None for a float network.
        top1_agreement: share of samples with the same largest output, 0 to 1; None for a float network or where no output is a
            row of scores.
        notes: one line for each thing worth knowing.
        runtime: where it was run: ``"onnxruntime"`` or ``"executorch"``.
        latency_ms: median on one thread, of an ExecuTorch file; `gossamer.benchmark` times files side by side.
    """

    path: Path
    size_bytes: int
    opset: int | None
    difference: float
    sqnr_db: float | None = None
    top1_agreement: float | None = None
    notes: tuple[str, ...] = ()
    runtime: str = "onnxruntime"
    latency_ms: float | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        if self.sqnr_db is None:
            agreement = f"largest relative difference {self.difference:.1e}"
        else:
            agreement = f"{self.sqnr_db:.1f} dB against the simulation"
            agreement += "" if self.top1_agreement is None else f", top-1 agreement {100 * self.top1_agreement:.1f}%"
        kind = "" if self.opset is None else f"opset {self.opset}, "
        text = f"{self.path}: {self.size_bytes} bytes, {kind}{agreement} in {_RUNTIME[self.runtime]}"
        return text if self.latency_ms is None else f"{text}, {self.latency_ms:.3g} ms on one thread"


def export(
    result_or_model: Result | nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    format: str | None = None,
    calibration: Iterable[Any] | None = None,
    parity: float = 1e-4,
) -> Export:
    """Write a network as one file, run it in the runtime it is for and compare it with the torch network.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = export(net, f"{folder.name}/net.onnx", example_inputs=(torch.ones(1, 4),))
        >>> file.opset, file.difference <= 1e-4, os.path.getsize(file) == file.size_bytes
        (21, True, True)
        >>> folder.cleanup()

    Args:
        result_or_model: a `Result`, a network (exported in eval mode), or a run folder.
        path: the file to write; replaced only by a file that was run and agrees.
        example_inputs: a tuple of positional inputs or a dict of keyword inputs; a `Result` and a run folder bring theirs.
            In ONNX, dimension 0 becomes dynamic, one input is called ``input``, several by the names of forward's parameters. An ExecuTorch
            file takes the shapes of the example inputs and no others.
        format: ``"onnx"`` or ``"executorch"`` (needs the extra ``gossamer[executorch]``); None goes by the name: a ``.pte`` is ExecuTorch's.
        calibration: batches to compare on besides; the first 64 samples are used. A quantised network is better judged on real data.
        parity: largest relative difference allowed for a float network.

    Returns:
        An `Export`. Equal networks give equal bytes.

    Raises:
        UsageError: an unknown format, no example inputs, or a path that cannot be written.
        ExportError: the network cannot be exported, or the file does not run or does not agree; no file is left.
        TraceError: the network's forward pass fails on the example inputs.
    """
    if format is None:
        format = "executorch" if Path(path).suffix == ".pte" else "onnx"
    if format not in FORMATS:
        raise UsageError(f"unknown export format {format!r}, known are {', '.join(FORMATS)}{near(str(format), FORMATS)}")
    if format == "executorch":
        return _executorch(result_or_model, Path(path), example_inputs, calibration, parity)
    model, inputs = _open(result_or_model, example_inputs)
    target = Path(path)
    _check_target(target, "model.onnx")
    program = export_program(model, inputs)
    input_names, output_names = _input_names(model, inputs), _output_names(model, inputs)
    tensors = [n for n, x in zip(input_names, pytree.tree_leaves(inputs), strict=True) if isinstance(x, Tensor)]
    try:
        written = rewrite(to_onnx(program, input_names=tensors, output_names=output_names))
    except torch.onnx.OnnxExporterError as e:
        raise ExportError(f"the network cannot be written as ONNX: {_cause(e)}") from None
    quantized = is_quantized(model)
    batches = [*real_batches(calibration, inputs), *([other_batch(inputs)] if program.dynamic else [])]
    with _beside(target) as temporary:
        _save(written, temporary)
        agreement = compare(model, partial(_in_onnxruntime, session(temporary), input_names), batches)
        notes = (*program.notes, *_judge(agreement, quantized, parity))
        files = _publish(temporary, target)
    if not quantized:
        return Export(target, files, OPSET, agreement.difference, notes=notes)
    return Export(target, files, OPSET, agreement.difference, agreement.sqnr_db, agreement.top1, notes)


def _executorch(source: Any, target: Path, example_inputs: Any, calibration: Iterable[Any] | None, parity: float) -> Export:
    from gossamer.exporting.executorch_file import write
    from gossamer.exporting.executorch_runtime import load_runtime

    load_runtime()
    _check_target(target, "model.pte")
    model, inputs = _open(source, example_inputs)
    quantized = is_quantized(model)
    with _beside(target) as temporary:
        agreement, latency_ms, notes = write(model, inputs, temporary, calibration=calibration)
        notes = (*notes, *_judge(agreement, quantized, parity, "executorch"))
        size = _publish(temporary, target)
    sqnr, top1 = (agreement.sqnr_db, agreement.top1) if quantized else (None, None)
    return Export(target, size, None, agreement.difference, sqnr, top1, notes, "executorch", latency_ms)


def _check_target(target: Path, name: str) -> None:
    if target.is_dir():
        raise UsageError(f"{target} is a folder: name a file, for example {target / name}")


def _in_onnxruntime(running: Any, names: list[str], leaves: list[Any]) -> list[Any]:
    return run(running, {n: x.numpy() for n, x in zip(names, leaves, strict=True) if isinstance(x, Tensor)})


def _open(source: Any, example_inputs: Any) -> tuple[nn.Module, Any]:
    if isinstance(source, Result):
        model, inputs = source.model, source.example_inputs if example_inputs is None else example_inputs
    elif isinstance(source, nn.Module):
        model, inputs = source, example_inputs
    elif isinstance(source, str | os.PathLike):
        from gossamer.plan import Plan
        from gossamer.run_folder import PLAN, load

        model, inputs = load(Path(source)), example_inputs
        if inputs is None:
            inputs = _filled(Plan.load(Path(source) / PLAN).example_inputs())
    else:
        raise UsageError(f"export takes a Result, a network or a run folder, not {type(source).__name__}")
    if inputs is None:
        raise UsageError("export needs example_inputs, for example (torch.zeros(1, 3, 224, 224),)")
    model = copy.deepcopy(model).cpu().eval()
    return model, pytree.tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, check_inputs(inputs))


def _filled(inputs: Any) -> Any:
    """Random normal values in place of the zeros that a plan records."""
    generator = torch.Generator().manual_seed(0)
    return pytree.tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x, inputs)


def _input_names(model: nn.Module, inputs: Any) -> list[str]:
    """One name for each flat input."""
    if isinstance(inputs, dict):
        named = [(k, pytree.tree_leaves(v)) for k, v in inputs.items()]
    elif len(inputs) == 1 and isinstance(inputs[0], Tensor):
        return ["input"]
    else:
        parameters = list(inspect.signature(model.forward).parameters.values())
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names = positional if len(positional) >= len(inputs) else [f"input_{i}" for i in range(len(inputs))]
        named = [(n, pytree.tree_leaves(x)) for n, x in zip(names, inputs, strict=False)]
    return [name if len(leaves) == 1 else f"{name}_{i}" for name, leaves in named for i in range(len(leaves))]


def _output_names(model: nn.Module, inputs: Any) -> list[str]:
    """One name for each output tensor: its key in a dict, else ``output``, numbered where there are several."""
    try:
        with torch.no_grad():
            out = call(model, inputs)
    except Exception as e:
        raise TraceError(f"the network's forward pass fails on the example inputs: {str(e).splitlines()[0][:200]}") from None
    if isinstance(out, Mapping):
        named = [(str(k), [t for t in pytree.tree_leaves(v) if isinstance(t, Tensor)]) for k, v in out.items()]
    else:
        named = [("output", [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)])]
    if not any(tensors for _, tensors in named):
        raise ExportError(f"the network returns no tensor but {type(out).__name__}")
    taken = set(_input_names(model, inputs))
    names = [name if len(tensors) == 1 else f"{name}_{i}" for name, tensors in named for i in range(len(tensors))]
    return [f"{n}_out" if n in taken else n for n in names]


def _cause(error: BaseException) -> str:
    """The innermost reason of an exporter's error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [s.strip() for s in str(error).splitlines() if s.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _judge(agreement: Agreement, quantized: bool, parity: float, runtime: str = "onnxruntime") -> tuple[str, ...]:
    if not quantized:
        if not agreement.difference <= parity:
            raise ExportError(f"the file differs from the network by {agreement.difference:.1e}, more than {parity:.0e}; it was removed")
        return ()
    if not agreement.sqnr_db > 3 and runtime == "executorch":
        raise ExportError(f"ExecuTorch gives something else than the quantised network ({agreement.sqnr_db:.1f} dB); the file was removed")
    if not agreement.sqnr_db > 3:
        raise ExportError(
            f"ONNX Runtime gives something else than the quantised network ({agreement.sqnr_db:.1f} dB): its int8 kernels saturate on "
            "this CPU; quantize with target='avx2'. The file was removed"
        )
    if agreement.sqnr_db < 12:
        return (
            f"{_RUNTIME[runtime]}'s integer kernels are {agreement.sqnr_db:.1f} dB from the simulation on this CPU: judge the file, not the network",
        )
    return ()


class _beside(tempfile.TemporaryDirectory):
    """A temporary folder beside the target, so that moving from it is atomic; gives the file's path in it."""

    def __init__(self, target: Path) -> None:
        self.file = target.name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            super().__init__(dir=target.parent, prefix=f".{target.name}.")
        except OSError as e:
            raise UsageError(f"cannot write {target}: {e.strerror}") from None

    def __enter__(self) -> Path:
        return Path(super().__enter__()) / self.file


def _save(model: onnx.ModelProto, path: Path) -> None:
    """Write and check; weights go beside the file only where it would be larger than protobuf allows."""
    try:
        if model.ByteSize() <= _LARGEST:
            path.write_bytes(model.SerializeToString(deterministic=True))
        else:
            onnx.save(model, path, save_as_external_data=True, location=path.name + ".data", convert_attribute=False)
        onnx.checker.check_model(str(path), full_check=True)
    except OSError as e:
        raise UsageError(f"cannot write {path.parent.parent / path.name}: {e.strerror}") from None
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise ExportError(f"the exported model is not valid ONNX: {str(e).splitlines()[0][:200]}") from None


def _publish(temporary: Path, target: Path) -> int:
    """Move the files into place, weights first; return their bytes."""
    total = 0
    for file in sorted(temporary.parent.iterdir(), reverse=True):
        total += file.stat().st_size
        os.chmod(file, 0o644)
        os.replace(file, target.parent / file.name)
    return total
