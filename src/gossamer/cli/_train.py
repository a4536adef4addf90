"""`gossamer train`: the one training loop on a model and data specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gossamer.errors import RunFolderError, SourceError
from gossamer.flow.job import Progress, check_folder
from gossamer.run_folder import save_weights


def train(
    model: str,
    data: str,
    out: Path,
    *,
    weights: Path | None,
    epochs: int,
    lr: float,
    optimizer: str,
    batch_size: int,
    resume: bool,
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Train and write ``model.safetensors`` and ``log.jsonl`` into ``out``; returns what was reached on held-out data."""
    from gossamer.profiling import evaluate
    from gossamer.sources import load_data, load_model
    from gossamer.training import fit

    loaded = load_model(model, weights=weights, seed=seed)
    found = load_data(data, transform=loaded.transform, seed=seed)
    if found.train is None:
        raise SourceError(f"{data} has no training split: use PATH/train and PATH/val")
    folder = check_folder(out, resume=resume)
    if (folder / "model.safetensors").exists():
        raise RunFolderError(f"{folder} is already trained: name another folder with --out")
    result = fit(
        loaded.model,
        found.loader("train", batch_size=batch_size, shuffle=True, seed=seed),
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        seed=seed,
        checkpoint=folder / "checkpoints",
        resume=resume and (folder / "checkpoints").exists(),
        log=folder / "log.jsonl",
        progress=(lambda done, total: progress("train", done, total)) if progress else None,
    )
    reached = evaluate(result.model, found.loader("val", batch_size=64), runtime="torch")
    path = save_weights(result.model, folder / "model.safetensors")
    assert reached.accuracy is not None
    return {"weights": str(path), "accuracy": reached.accuracy.value, "n": reached.n, "seconds": result.seconds, "epochs": epochs}
