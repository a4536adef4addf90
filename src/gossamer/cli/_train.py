"""`gossamer train`: the one training loop on a model and data specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from gossamer.errors import RunFolderError, SourceError
from gossamer.flow.job import Progress, check_folder
from gossamer.run_folder import save_weights
from gossamer.sources import Data


def open_both(model: str, data: str, *, weights: Path | None, seed: int, skip_unreadable: bool) -> tuple[nn.Module, Data]:
    """The network, and data with a training split."""
    from gossamer.sources import load_data, load_model

    loaded = load_model(model, weights=weights, seed=seed)
    found = load_data(data, transform=loaded.transform, seed=seed, skip_unreadable=skip_unreadable)
    if found.train is None:
        raise SourceError(f"{data} has no training split: use PATH/train and PATH/val")
    return loaded.model, found


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
) -> dict[str, Any]:
    """Train and write ``model.safetensors`` and ``log.jsonl`` into ``out``; returns what was reached on held-out data."""
    from gossamer.profiling import evaluate
    from gossamer.training import fit

    folder = check_folder(out, resume=resume)
    if (folder / "model.safetensors").exists():
        raise RunFolderError(f"{folder} is already trained: name another folder with --out")
    result = fit(
        model,
        data.loader("train", batch_size=batch_size, shuffle=True, seed=seed, num_workers=workers),
        seed=seed,
        checkpoint=folder / "checkpoints",
        resume=resume and (folder / "checkpoints").exists(),
        log=folder / "log.jsonl",
        progress=(lambda done, total: progress("train", done, total)) if progress else None,
        **options,
    )
    reached = evaluate(result.model, data.loader("val", batch_size=64), runtime="torch")
    path = save_weights(result.model, folder / "model.safetensors")
    assert reached.accuracy is not None
    summary = {"weights": str(path), "accuracy": reached.accuracy.value, "n": reached.n, "seconds": result.seconds}
    summary |= {"epochs": len(result.history), "optimizer_state_bytes": result.optimizer_state_bytes}
    if result.memory is not None:
        summary["peak_bytes"] = result.memory.peak_bytes
    return summary
