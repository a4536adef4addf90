"""Top-1 accuracy of an artefact where it runs, and how far its outputs are from the original's, in one pass over the data."""

from __future__ import annotations

import inspect
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtri
from torch import Tensor, nn

from gossamer.errors import SourceError, UsageError
from gossamer.profiling.artefacts import Artefact, check_runtime, resolve
from gossamer.profiling.runtime import Array, as_array, cores, evaluating, first_line, run_onnx, session, shape_text, torch_threads
from gossamer.result import ExampleInputs
from gossamer.sources.batches import Batch, call, count, outputs, split


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on labelled items.

    Attributes:
        value: as a fraction of 1.
        correct: items whose largest logit is the label's.
        n: items.
        interval: 95% Wilson interval of ``value``.
    """

    value: float
    correct: int
    n: int
    interval: tuple[float, float]

    @classmethod
    def of(cls, correct: int, n: int) -> Accuracy:
        """From the number of correct items."""
        return cls(correct / n, correct, n, wilson(correct, n))


@dataclass(frozen=True)
class Evaluation:
    """An artefact on data, and beside the original where one was given.

    Attributes:
        n: items.
        accuracy: top-1; None where the data has no labels.
        reference_accuracy: the original's on the same items; None without labels or without an original.
        agreement: fraction of items on which both have their largest logit in the same place; None without an original.
        sqnr_db: 10 log10(sum r^2 / sum (r - y)^2) over all logits, r the original's; infinite where equal, None without an original.
        runtime: where the artefact ran.
        threads: for each operator.
        seconds: of the whole pass.
    """

    n: int
    accuracy: Accuracy | None
    reference_accuracy: Accuracy | None
    agreement: float | None
    sqnr_db: float | None
    runtime: str
    threads: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain data; an infinite ratio is ``"Infinity"``."""
        plain = asdict(self)
        return plain | {"sqnr_db": "Infinity" if plain["sqnr_db"] == math.inf else plain["sqnr_db"]}

    def __str__(self) -> str:
        from gossamer.report.text import evaluation_line

        return evaluation_line(self)


def wilson(correct: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, JASA 22, 1927).

    Examples:
        >>> low, high = wilson(80, 100)
        >>> round(low, 3), round(high, 3)
        (0.711, 0.867)

    Args:
        correct: successes, 0 to ``n``.
        n: trials, at least 1.
        confidence: two-sided, within (0, 1).

    Returns:
        Its ends, within [0, 1].
    """
    z = float(ndtri(0.5 + confidence / 2))
    p, share = correct / n, z * z / n
    middle = (p + share / 2) / (1 + share)
    half = z / (1 + share) * math.sqrt(p * (1 - p) / n + share / (4 * n))
    return (0.0 if correct == 0 else max(0.0, middle - half), 1.0 if correct == n else min(1.0, middle + half))


def evaluate(
    artefact: Any,
    batches: Iterable[Any],
    *,
    reference: Any = None,
    runtime: str | None = None,
    threads: int | None = None,
    example_inputs: ExampleInputs = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Top-1 accuracy of an artefact, and its agreement with the original, in one pass over the data.

    Examples:
        >>> import torch
        >>> pick = torch.nn.Linear(3, 3, bias=False)
        >>> _ = torch.nn.init.eye_(pick.weight)
        >>> evaluate(pick, [(torch.eye(3), torch.tensor([0, 1, 1]))], reference=pick).accuracy.correct
        2

    Args:
        artefact: an ``.onnx`` or ``.pte`` file, a run folder, a network or a `Result`.
        batches: inputs followed by labels, int of shape ``(N,)``; inputs alone give agreement without accuracy. Read once.
        reference: the original, of the same kinds.
        runtime: None runs files and run folders in ONNX Runtime and networks in torch; ``"onnxruntime"`` and ``"executorch"``
            export networks first, ``"torch"`` loads run folders. A ``.pte`` file always runs in ExecuTorch.
        threads: for each operator; None for every core.
        example_inputs: tells inputs from labels, and is what a network is exported with; needed only for networks with several inputs.
        progress: called with batches done and their number (0 where that is not known).

    Returns:
        An `Evaluation`; logits are the first output.

    Raises:
        SourceError: no data, or labels that do not fit the logits.
        UsageError: inputs that the artefact does not take, logits that are NaN, or an unknown runtime.
    """
    if runtime is not None:
        check_runtime(runtime)
    threads = cores() if threads is None else threads
    begun, tally, total = time.perf_counter(), _Tally(), count(batches) or 0
    with ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gossamer-")))
        tested = _Runner(resolve(artefact), runtime, threads, example_inputs, place, stack)
        original = None if reference is None else _Runner(resolve(reference), runtime, threads, example_inputs, place, stack)
        for done, raw in enumerate(batches, start=1):
            batch = tested.split(raw)
            logits = tested.logits(batch)
            tally.add(logits, batch.target, None if original is None else original.logits(batch), tested.name)
            if progress is not None:
                progress(done, total)
    if tally.n == 0:
        raise SourceError("the data is empty: not one item to evaluate came out of it")
    return Evaluation(
        n=tally.n,
        accuracy=Accuracy.of(tally.correct, tally.labelled) if tally.labelled else None,
        reference_accuracy=Accuracy.of(tally.reference_correct, tally.labelled) if tally.labelled and original else None,
        agreement=tally.agreed / tally.n if original and tally.ranked else None,
        sqnr_db=sqnr_db(tally.signal, tally.noise) if original else None,
        runtime=tested.runtime,
        threads=threads,
        seconds=time.perf_counter() - begun,
    )


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to quantisation noise in decibels, from the sums of squares of the reference and of the difference.

    Examples:
        >>> sqnr_db(100.0, 1.0), sqnr_db(1.0, 0.0)
        (20.0, inf)
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


class _Tally:
    """Counts over batches."""

    def __init__(self) -> None:
        self.n = self.labelled = self.correct = self.reference_correct = self.agreed = 0
        self.signal = self.noise = 0.0
        self.ranked = True

    def add(self, logits: Array, target: Any, reference: Array | None, name: str) -> None:
        first, self.n = self.n, self.n + len(logits)
        if reference is not None:
            self._compare(logits, reference, name)
        if target is None:
            return
        labels_N = _labels(target, logits, first, name)
        self.labelled += len(labels_N)
        self.correct += int((logits.argmax(1) == labels_N).sum())
        if reference is not None:
            self.reference_correct += int((reference.argmax(1) == labels_N).sum())

    def _compare(self, logits: Array, reference: Array, name: str) -> None:
        if reference.shape != logits.shape:
            raise UsageError(f"{name} gives outputs of shape {shape_text(logits.shape)}, but the reference {shape_text(reference.shape)}")
        if logits.ndim == 2:
            self.agreed += int((logits.argmax(1) == reference.argmax(1)).sum())
        else:
            self.ranked = False
        finite = np.isfinite(reference) & np.isfinite(logits)
        r, y = reference[finite].astype(np.float64), logits[finite].astype(np.float64)
        self.signal += float((r * r).sum())
        self.noise += float(((r - y) ** 2).sum())


def _labels(target: Any, logits: Array, first: int, name: str) -> Array:
    """Labels that index the logits, or SourceError."""
    if logits.ndim != 2:
        raise SourceError(
            f"top-1 needs logits of shape (N, classes), but {name} gives {shape_text(logits.shape)}: pass batches without labels"
        )
    labels = as_array(target)
    if labels.shape != logits.shape[:1] or labels.dtype.kind not in "iu":
        raise SourceError(
            f"labels must be {len(logits)} whole numbers, one for each item, not {labels.dtype.name} of shape {shape_text(labels.shape)}"
        )
    wrong = (labels < 0) | (labels >= logits.shape[1])
    if wrong.any():
        at = int(wrong.argmax())
        raise SourceError(
            f"label {int(labels[at])} of item {first + at} is outside the {logits.shape[1]} logits of {name} (0 to {logits.shape[1] - 1}): "
            "the data is labelled for another network"
        )
    return labels


class _Runner:
    """An artefact ready to give logits, in ONNX Runtime, ExecuTorch or torch."""

    def __init__(
        self, artefact: Artefact, runtime: str | None, threads: int, example_inputs: ExampleInputs, place: Path, stack: ExitStack
    ) -> None:
        in_memory = artefact.model is not None
        self.runtime = "executorch" if artefact.is_pte else runtime or ("torch" if in_memory else "onnxruntime")
        self.name = artefact.name
        inputs = example_inputs if example_inputs is not None else artefact.example_inputs
        self.module: nn.Module | None = None
        if self.runtime == "torch":
            self.module = stack.enter_context(evaluating(artefact.module()))
            self.takes = inputs if inputs is not None else artefact.inputs() or range(_positional(self.module))
        elif self.runtime == "executorch":
            from gossamer.profiling.executorch import opened

            self.method = opened(artefact.exported(place, inputs, self.runtime), threads, name=self.name)
            self.takes = range(len(self.method.method.shapes))
        else:
            self.session = session(artefact.exported(place, inputs, self.runtime), threads)
            self.takes = range(len(self.session.get_inputs()))

    def split(self, raw: Any) -> Batch:
        return split(raw, self.takes)

    def logits(self, batch: Batch) -> Array:
        if self.module is not None:
            logits = self._in_torch(batch)
        elif self.runtime == "executorch":
            logits = self.method.logits(batch)
        else:
            logits = run_onnx(self.session, batch, name=self.name)[0]
        if np.isnan(logits).any():
            at = int(np.isnan(logits.reshape(len(logits), -1)).any(1).argmax())
            raise UsageError(f"{self.name} gives NaN for item {at} of a batch of {len(logits)}: are the inputs or the weights NaN?")
        return logits

    def _in_torch(self, batch: Batch) -> Array:
        assert self.module is not None
        expected = tuple(self.takes.values()) if isinstance(self.takes, dict) else self.takes
        given = batch.args or tuple(batch.kwargs.values())
        try:
            found = outputs(call(self.module, batch.kwargs or batch.args))
        except (RuntimeError, TypeError, ValueError, IndexError) as e:
            shapes = ", ".join(shape_text(t.shape) for t in given if isinstance(t, Tensor))
            wanted = ", ".join(shape_text(("N", *t.shape[1:])) for t in expected if isinstance(t, Tensor))
            takes = f" (it takes {wanted})" if wanted else ""
            raise UsageError(f"{self.name} fails on inputs of shape {shapes}{takes}: {first_line(e)}") from e
        if not found:
            raise UsageError(f"{self.name} gives no tensor")
        return as_array(found[0])


def _positional(module: nn.Module) -> int:
    """Inputs that a network's forward needs by position; 1 where its signature does not tell."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds and p.default is inspect.Parameter.empty]
    return max(1, len(needed))
