"""The compressed network as an ExecuTorch file beside the ONNX one, measured in ExecuTorch against the original there."""

from __future__ import annotations

from pathlib import Path

from gossamer.flow.job import Job
from gossamer.flow.measure import latency_of
from gossamer.report.schema import Accuracy, Executorch
from gossamer.result import Result
from gossamer.run_folder import PTE


def measure_executorch(job: Job, result: Result, folder: Path, checkpoints: Path) -> Executorch:
    """Write ``folder/model.pte``, and the original beside the checkpoints; run both in ExecuTorch.

    Args:
        job: data, seed and threads.
        result: the compressed network.
        folder: the run's.
        checkpoints: where the original's file goes.

    Returns:
        Bytes, latency against the original's file, top-1 and agreement with the original.

    Raises:
        UsageError: ExecuTorch is not installed.
        ExportError: one of the networks cannot be written for it, or does not agree.
    """
    from gossamer.exporting import export
    from gossamer.profiling import benchmark, evaluate

    inputs = job.example_inputs
    before = export(job.model, checkpoints / "original.pte", example_inputs=inputs, calibration=job.calibration)
    after = export(result, folder / PTE, example_inputs=inputs, calibration=job.calibration)
    timed = benchmark(before, after, example_inputs=inputs, runtime="executorch", threads=job.threads)
    seen = evaluate(after, job.evaluation, reference=before, example_inputs=inputs)
    first, row = timed.rows
    return Executorch(
        file=PTE,
        before_size_bytes=before.size_bytes,
        size_bytes=after.size_bytes,
        before_median_ms=first.median_ms,
        latency_ms=latency_of(timed, row, f"{timed.runtime} {timed.runtime_version}"),
        difference=after.difference if after.sqnr_db is None else None,
        simulation_sqnr_db=after.sqnr_db,
        accuracy=None if seen.accuracy is None else Accuracy(value=seen.accuracy.value, n=seen.n, interval=seen.accuracy.interval),
        top1_agreement=seen.agreement,
        notes=list(after.notes),
    )
