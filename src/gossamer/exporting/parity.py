"""An exported file held against the torch network it was made from, on real inputs and on another batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gossamer.errors import ExportError
from gossamer.sources.batches import call, outputs, split

_SAMPLES = 64  # of the calibration data, at most


@dataclass(frozen=True)
class Agreement:
    """How far two sets of outputs agree.

    Attributes:
        difference: largest relative difference, ``max|a - b| / max|a|``, over outputs and batches.
        sqnr_db: ``10 log10(sum a^2 / sum (a - b)^2)``, all outputs together, in decibels; infinite where they are equal.
        top1: share of rows with the same largest entry, of the first output of shape (batch, classes); None where there is none.
        samples: rows compared.
    """

    difference: float
    sqnr_db: float
    top1: float | None
    samples: int


def compare(model: nn.Module, execute: Callable[[list[Any]], list[Any]], batches: Iterable[Any]) -> Agreement:
    """Run ``model`` and its file on the same batches.

    Args:
        model: in eval mode, on the CPU.
        execute: runs the file: takes the flat inputs, returns all outputs, tensors or arrays.
        batches: inputs as `gossamer.sources.batches.call` takes them.

    Raises:
        ExportError: the file does not run, gives other shapes, or the network gives NaN.
    """
    worst = signal = noise = 0.0
    same = rows = samples = 0
    for inputs in batches:
        with torch.no_grad():
            ours = [t.detach() for t in outputs(call(model, inputs))]
        theirs = [torch.from_numpy(np.asarray(o)) for o in execute(pytree.tree_leaves(inputs))]
        samples += next((t.shape[0] for t in ours if t.dim()), 1)
        for a, b in zip(ours, theirs, strict=True):
            if a.shape != b.shape:
                raise ExportError(f"the file gives shape {tuple(b.shape)} where the network gives {tuple(a.shape)}")
            if not bool(torch.isfinite(a).all()):
                raise ExportError(
                    "the network gives NaN or infinity on the inputs it is compared on: check its weights and the example inputs"
                )
            if not a.numel():
                continue
            error = (a.double() - b.double()).abs()
            scale = float(a.double().abs().max())
            worst = max(worst, float(error.max()) / scale if scale else float(error.max()))
            signal, noise = signal + float(a.double().square().sum()), noise + float(error.square().sum())
        scores = next(
            ((a, b) for a, b in zip(ours, theirs, strict=True) if a.dim() == 2 and a.shape[1] > 1 and a.is_floating_point()), None
        )
        if scores:
            same += int((scores[0].argmax(1) == scores[1].argmax(1)).sum())
            rows += scores[0].shape[0]
    sqnr = math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
    return Agreement(worst, sqnr, same / rows if rows else None, samples)


def real_batches(calibration: Iterable[Any] | None, example_inputs: Any) -> list[Any]:
    """Inputs of the first `_SAMPLES` samples of calibration data; the example inputs where there is none."""
    kept: list[Any] = []
    samples = 0
    for batch in () if calibration is None else [calibration] if isinstance(calibration, Tensor) else calibration:
        args, kwargs, _ = split(batch, example_inputs)
        if isinstance(example_inputs, dict):
            kept.append({k: kwargs[k] for k in example_inputs} if kwargs else dict(zip(example_inputs, args, strict=True)))
        else:
            kept.append(args)
        samples += next((t.shape[0] for t in pytree.tree_leaves(kept[-1]) if isinstance(t, Tensor) and t.dim()), 1)
        if samples >= _SAMPLES:
            break
    return kept or [example_inputs]


def fixed_batches(calibration: Iterable[Any] | None, example_inputs: Any) -> list[Any]:
    """The same inputs cut into batches of the example's size, for a file that takes no other; what is left over is not used."""
    size = next((t.shape[0] for t in pytree.tree_leaves(example_inputs) if isinstance(t, Tensor) and t.dim()), None)
    if not size:
        return [example_inputs]
    cut: list[Any] = []
    for batch in real_batches(calibration, example_inputs):
        whole = next(t.shape[0] for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim())

        def part(x: Any, first: int, whole: int = whole) -> Any:
            return x[first : first + size] if isinstance(x, Tensor) and x.dim() and x.shape[0] == whole else x

        cut += [pytree.tree_map(lambda x, i=i, part=part: part(x, i), batch) for i in range(0, whole - size + 1, size)]
    return cut[: max(1, _SAMPLES // size)] or [example_inputs]


def other_batch(example_inputs: Any) -> Any:
    """Inputs of one sample more than the example's (random normal where floating, repeated where integer)."""
    leaves = [t for t in pytree.tree_leaves(example_inputs) if isinstance(t, Tensor) and t.dim()]
    batch = leaves[0].shape[0] if leaves else 0

    def grown(x: Any) -> Any:
        return torch.cat([x, x[:1]]) if isinstance(x, Tensor) and x.dim() and x.shape[0] == batch else x

    return noise(pytree.tree_map(grown, example_inputs))


def noise(example_inputs: Any) -> Any:
    """Inputs of the example's shapes: random normal where floating, the same where integer."""
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Any) -> Any:
        floating = isinstance(x, Tensor) and x.is_floating_point()
        return torch.randn(x.shape, generator=generator, dtype=x.dtype) if floating else x

    return pytree.tree_map(drawn, example_inputs)
