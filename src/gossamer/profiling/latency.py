"""Latency side by side: every round runs each artefact once, in shuffled order, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.errors import UsageError
from gossamer.profiling.artefacts import Artefact, check_runtime, resolve, unique, weight_file_bytes
from gossamer.profiling.runtime import (
    Array,
    as_array,
    as_batch,
    disk_bytes,
    evaluating,
    feed,
    first_line,
    random_inputs,
    session,
    torch_threads,
)
from gossamer.result import ExampleInputs
from gossamer.run_folder import processor
from gossamer.sources.batches import Batch, check_inputs

MIN_ROUNDS = 5
"""Rounds that are timed even where they take longer than asked: fewer show no spread."""


@dataclass(frozen=True)
class Timing:
    """Latency of one artefact.

    Attributes:
        name: of the artefact.
        size_bytes: on disk: the ``.onnx`` file, or, in torch, the weights as safetensors.
        median_ms, p10_ms, p90_ms: of the runs, in milliseconds.
        ratio, ratio_p10, ratio_p90: of the run to the first artefact's run in the same round: median and spread. Below 1 is faster.
        runs: timed runs.
    """

    name: str
    size_bytes: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    runs: int


@dataclass(frozen=True)
class Benchmark:
    """Artefacts timed side by side; prints as a table.

    Attributes:
        rows: one `Timing` for each artefact, in the order given.
        runtime: ``"onnxruntime"``, ``"torch"`` or ``"executorch"``; both where files of two runtimes are timed side by side.
        runtime_version: its version, or versions.
        threads: for each operator.
        batch: size of the batch.
        inputs: shape of each input.
        processor: the CPU and its vector extensions.
    """

    rows: tuple[Timing, ...]
    runtime: str
    runtime_version: str
    threads: int
    batch: int
    inputs: tuple[tuple[int, ...], ...]
    processor: str

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        from gossamer.report.text import benchmark_table

        return benchmark_table(self)


def benchmark(
    *artefacts: Any,
    example_inputs: ExampleInputs = None,
    runtime: str = "onnxruntime",
    threads: int = 1,
    runs: int | None = None,
    warmup: int = 5,
    seconds: float = 2.0,
    names: Sequence[str] | None = None,
) -> Benchmark:
    """Time artefacts side by side in the runtime they ship to.

    Each round runs every artefact once, in shuffled order; ratios are those of runs of the same round. In ONNX Runtime: CPU, all graph
    optimisations, one operator at a time. A ``.pte`` file runs in ExecuTorch whatever the runtime, so that it can be timed beside an ``.onnx``.

    Examples:
        >>> import torch, gossamer as gs
        >>> small, large = torch.nn.Linear(8, 8), torch.nn.Sequential(torch.nn.Linear(8, 512), torch.nn.Linear(512, 8))
        >>> times = gs.benchmark(small, large, example_inputs=(torch.zeros(1, 8),), runtime="torch", runs=20)
        >>> times.rows[0].name, times.rows[0].ratio, times.rows[1].runs
        ('Linear', 1.0, 20)

    Args:
        artefacts: ``.onnx`` and ``.pte`` files, run folders, networks, `Result`s or `Export`s. The first is what the others are compared with.
            Networks are exported to a temporary file (runtimes ``"onnxruntime"`` and ``"executorch"``) or run as they are (``"torch"``).
        example_inputs: a tuple of inputs (a dict for keyword inputs). Default: those of the first `Result` or run folder, else
            random ones of the shapes that the first file declares, batch 1.
        runtime: ``"onnxruntime"``, ``"torch"`` or ``"executorch"``.
        threads: for each operator, at least 1.
        runs: rounds; None for as many as fit in ``seconds``.
        warmup: untimed rounds.
        seconds: time for each artefact, where ``runs`` is None.
        names: for the table, one for each artefact.

    Returns:
        A `Benchmark`.

    Raises:
        UsageError: no artefact, an unknown runtime, a missing file, or inputs that an artefact does not take.
    """
    check_runtime(runtime)
    if not artefacts:
        raise UsageError("nothing to time: pass .onnx files, run folders, networks or results")
    if threads < 1 or (runs is not None and runs < 1) or warmup < 0 or seconds <= 0:
        raise UsageError("threads and runs must be at least 1, warmup at least 0 and seconds above 0")
    if names is not None and len(names) != len(artefacts):
        raise UsageError(f"{len(names)} names for {len(artefacts)} artefacts")
    resolved = [resolve(a) for a in artefacts]
    inputs = check_inputs(brought_inputs(resolved, example_inputs))
    batch = as_batch(inputs)
    with ExitStack() as stack:
        workplace = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gossamer-")))
        if runtime == "torch":
            stack.enter_context(torch_threads(threads))
            opened = [_in_torch(a, batch, workplace, stack) for a in resolved]
        else:
            opened = [_in_file(a, inputs, batch, threads, workplace, runtime) for a in resolved]
        times = time_interleaved([run for run, _ in opened], runs=runs, seconds=seconds, warmup=warmup)
    shapes = tuple(tuple(int(d) for d in as_array(v).shape) for v in (batch.args or tuple(batch.kwargs.values())))
    ran = [runtime] if runtime == "torch" else sorted({"executorch" if a.is_pte else runtime for a in resolved}, reverse=True)
    return Benchmark(
        rows=summarise(list(names) if names is not None else unique([a.name for a in resolved]), [size for _, size in opened], times),
        runtime=", ".join(ran),
        runtime_version=", ".join(map(version, ran)),
        threads=threads,
        batch=shapes[0][0] if shapes and shapes[0] else 1,
        inputs=shapes,
        processor=processor(),
    )


def time_interleaved(
    runners: Sequence[Callable[[], object]],
    *,
    runs: int | None = None,
    seconds: float = 2.0,
    warmup: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> Array:
    """Time callables in rounds; each round calls every one of them once, in shuffled order.

    Examples:
        >>> time_interleaved([lambda: None, lambda: None], runs=3).shape
        (3, 2)

    Args:
        runners: what to time.
        runs: rounds; None for as many as fit in ``seconds * len(runners)``, but at least `MIN_ROUNDS`.
        seconds: time for each runner; warming up ends after as long, too.
        warmup: untimed rounds before.
        clock: seconds as a float.
        seed: of the order.

    Returns:
        Seconds of each call, shape ``(rounds, runners)``.
    """
    order, shuffle = list(range(len(runners))), random.Random(seed).shuffle
    allowed, collecting = seconds * len(runners), gc.isenabled()
    times: list[list[float]] = []
    begun = clock()
    for _ in range(warmup):
        for runner in runners:
            runner()
        if clock() - begun > allowed:
            break
    gc.disable()
    try:
        begun = clock()
        while len(times) < runs if runs is not None else len(times) < MIN_ROUNDS or clock() - begun < allowed:
            shuffle(order)
            row = [0.0] * len(runners)
            for i in order:
                started = clock()
                runners[i]()
                row[i] = clock() - started
            times.append(row)
    finally:
        if collecting:
            gc.enable()
    return np.array(times)


def summarise(names: Sequence[str], sizes: Sequence[int], times_RA: Array) -> tuple[Timing, ...]:
    """Median, spread and paired ratios of interleaved times.

    Examples:
        >>> rows = summarise(["a", "b"], [10, 5], np.array([[0.002, 0.001], [0.004, 0.001], [0.002, 0.001]]))
        >>> rows[1].median_ms, rows[1].ratio
        (1.0, 0.5)

    Args:
        names, sizes: of the artefacts.
        times_RA: seconds, rounds by artefacts.

    Returns:
        One `Timing` for each artefact; its ratios are taken within rounds, to the first artefact.
    """
    ms_3A = np.percentile(times_RA, (50, 10, 90), axis=0) * 1e3
    ratio_3A = np.percentile(times_RA / np.maximum(times_RA[:, :1], 1e-12), (50, 10, 90), axis=0)
    rows = []
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        median, p10, p90 = ms_3A[:, i].tolist()
        ratio, ratio_p10, ratio_p90 = ratio_3A[:, i].tolist()
        rows.append(Timing(name, int(size), median, p10, p90, ratio, ratio_p10, ratio_p90, len(times_RA)))
    return tuple(rows)


def brought_inputs(artefacts: Sequence[Artefact], example_inputs: ExampleInputs) -> ExampleInputs:
    """The inputs given, or else those of the first artefact that brings some, or random ones of the first file's shapes."""
    if example_inputs is not None:
        return example_inputs
    for artefact in artefacts:
        brought = artefact.inputs()
        if brought is not None:
            return brought
    for artefact in artefacts:
        if artefact.is_pte:
            from gossamer.profiling.executorch import opened

            return opened(artefact.file, 1, name=artefact.name).random_inputs()
        if artefact.file is not None:
            return random_inputs(session(artefact.file, 1))
    raise UsageError(f"{artefacts[0].name} brings no inputs: pass example_inputs, for example (torch.zeros(1, 3, 224, 224),)")


Opened = tuple[Callable[[], object], int]


def _in_file(artefact: Artefact, inputs: ExampleInputs, batch: Batch, threads: int, workplace: Path, runtime: str) -> Opened:
    path = artefact.exported(workplace, inputs, runtime)
    if path.suffix == ".pte":
        from gossamer.profiling.executorch import opened

        method = opened(path, threads, name=artefact.name)
        fixed = method.checked(batch)
        return (lambda: method.method.run(fixed)), path.stat().st_size
    loaded = session(path, threads)
    fed = feed(loaded, batch, name=artefact.name)
    return (lambda: loaded.run(None, fed)), disk_bytes(path)


def _in_torch(artefact: Artefact, batch: Batch, workplace: Path, stack: ExitStack) -> Opened:
    model = stack.enter_context(evaluating(artefact.module()))
    try:
        model(*batch.args, **batch.kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as e:
        raise UsageError(f"{artefact.name} fails on the example inputs: {first_line(e)}") from e
    return (lambda: model(*batch.args, **batch.kwargs)), weight_file_bytes(model, workplace)
