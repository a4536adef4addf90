"""`gossamer train`: the one training loop on a model and data specification."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gossamer.errors import RunFolderError, SourceError, UsageError
from gossamer.flow.job import Progress, check_folder
from gossamer.flow.together import rank
from gossamer.run_folder import save_weights
from gossamer.sources import Data

if TYPE_CHECKING:
    from gossamer.parallel import Parallel


def open_both(
    model: str, data: str, *, weights: Path | None, seed: int, skip_unreadable: bool, validation: str | None, hold_back: bool
) -> tuple[nn.Module, Data, Any]:
    """The network, data with a training split, and batches to judge epochs on, by default held back from training where that is asked for."""
    from gossamer.sources import load_data, load_model

    loaded = load_model(model, weights=weights, seed=seed)
    options: dict[str, Any] = {"transform": loaded.transform, "seed": seed, "skip_unreadable": skip_unreadable}
    found, judge = load_data(data, **options), load_data(validation, **options) if validation is not None else None
    if found.train is None:
        raise SourceError(f"{data} has no training split: use PATH/train and PATH/val")
    if judge is None and hold_back:
        found, judge = found.hold_back()
    return loaded.model, found, judge.loader("val") if judge is not None else None


def explain(model: nn.Module, data: Data, *, batch_size: int, **options: Any) -> Any:
    """What a step takes, as a `MemoryReport`."""
    from gossamer.training import explain_memory

    return explain_memory(model, data.loader("train", batch_size=batch_size), **options)


def train(
    model: nn.Module,
    data: Data,
    out: Path,
    *,
    batch_size: int,
    workers: int,
    resume: bool,
    seed: int,
    progress: Progress | None,
    **options: Any,
) -> dict[str, Any] | None:
    """Train and write ``model.safetensors`` and ``log.jsonl`` into ``out``; returns what was reached on held-out data.

    None in all processes of a parallel training but the first: only that one writes and prints.
    """
    from gossamer.profiling import evaluate
    from gossamer.training import fit

    if options.get("parallel") is not None:
        from gossamer.parallel import restarted

        resume = resume or restarted()
    folder = check_folder(out, resume=resume)
    if (folder / "model.safetensors").exists():
        raise RunFolderError(f"{folder} is already trained: name another folder with --out")
    parallel: Parallel | None = options.get("parallel")
    stages = parallel is not None and parallel.pipeline > 1  # whose batches are whole micro-batches
    result = fit(
        model,
        data.loader("train", batch_size=batch_size, shuffle=True, seed=seed, num_workers=workers, drop_last=stages),
        seed=seed,
        checkpoint=folder / "checkpoints",
        resume=resume and (folder / "checkpoints").exists(),
        log=folder / "log.jsonl",
        progress=(lambda done, total: progress("train", done, total)) if progress else None,
        **options,
    )
    if not is_first():
        return None
    reached = evaluate(result.model, data.loader("val", batch_size=64), runtime="torch")
    path = save_weights(result.model, folder / "model.safetensors")
    assert reached.accuracy is not None
    summary = {"weights": str(path), "accuracy": reached.accuracy.value, "n": reached.n, "seconds": result.seconds}
    summary |= {"epochs": len(result.history), "optimizer_state_bytes": result.optimizer_state_bytes}
    if result.best_epoch is not None:
        summary["best_epoch"] = result.best_epoch
    if result.memory is not None:
        summary["peak_bytes"] = result.memory.peak_bytes
    return summary


def parallel_of(text: str | None) -> Parallel | None:
    """What ``--parallel`` asks for; UsageError with the command to type where torchrun started no processes."""
    if text is None:
        return None
    from gossamer.parallel import Parallel

    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        degrees = [int(n) for n in re.findall(r",\s*(\d+)", text)]
        n = max(2, math.prod(degrees))
        Parallel.parse(text, world=n)
        raise UsageError(
            f"--parallel {text} needs several processes, which torchrun starts: "
            f"torchrun --nproc-per-node {n} -m gossamer {shlex.join(sys.argv[1:])}"
        )
    return Parallel.parse(text)


def is_first() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return rank() == 0
