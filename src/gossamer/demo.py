"""The demo: the whole flow on scikit-learn's digits, with thresholds that it asserts itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.errors import SourceError
from gossamer.flow.job import Progress
from gossamer.recipe import Distill, Prune, Quantize

MODEL = "gossamer:resnet8?width=64&in_channels=1"
RECIPE = (Prune(macs=0.5, round_to=8), Distill(epochs=10, lr=2e-3, alpha=0.7), Quantize())
EPOCHS = 15


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo reached: its report, one line per threshold, and whether all hold."""

    report: dict[str, Any]
    folder: Path
    checks: tuple[str, ...]
    passed: bool


def run_demo(out: str | Path | None = None, *, seed: int = 0, progress: Progress | None = None) -> DemoOutcome:
    """Train a small residual network on digits, compress it, and check what came out in ONNX Runtime.

    Args:
        out: run folder; default ``runs/demo``, or the next free ``runs/demo-N``.
        seed: of training and compression.
        progress: called with stage, done, total.

    Returns:
        The outcome; ``passed`` is False where a threshold is missed.
    """
    from gossamer.flow import compress
    from gossamer.flow.job import check_folder
    from gossamer.run_folder import save_weights
    from gossamer.sources import load_data, load_model
    from gossamer.training import fit

    folder = check_folder(out, resume=False) if out is not None else _free(Path("runs/demo"))
    data = load_data("digits", seed=seed)
    if data.train is None:
        raise SourceError("digits has no training split")
    loaded = load_model(MODEL, seed=seed)
    trained = fit(
        loaded.model,
        data.loader("train", batch_size=64, shuffle=True, seed=seed),
        epochs=EPOCHS,
        lr=2e-3,
        seed=seed,
        progress=(lambda done, total: progress("train", done, total)) if progress else None,
    )
    weights = save_weights(trained.model, folder.with_name(folder.name + "-original") / "model.safetensors")
    result = compress(MODEL, data, weights=weights, recipe=list(RECIPE), out=folder, seed=seed, progress=progress)
    assert result.report is not None
    before, after = result.report["before"], result.report["after"]
    drop = before["accuracy"]["value"] - after["accuracy"]["value"]
    rows = [
        (before["accuracy"]["value"] >= 0.97, f"original top-1 {before['accuracy']['value']:.2%} >= 97%"),
        (after["macs"] <= 0.5 * before["macs"], f"MACs {after['macs'] / before['macs']:.3f} of the original <= 0.5"),
        (drop <= 0.01, f"accuracy drop {100 * drop:+.2f} points <= 1"),
        (after["size_bytes"] <= before["size_bytes"] / 5, f"file {after['size_bytes'] / before['size_bytes']:.3f} of the original <= 0.2"),
        (
            after["latency_ms"]["median"] <= before["latency_ms"]["median"],
            f"median latency {after['latency_ms']['median'] / before['latency_ms']['median']:.2f} of the original <= 1",
        ),
    ]
    checks = tuple(f"{'ok  ' if good else 'MISS'}  {text}" for good, text in rows)
    return DemoOutcome(dict(result.report), folder, checks, all(good for good, _ in rows))


def _free(folder: Path) -> Path:
    """``folder``, or the first of ``folder-2``, ``folder-3``, ... where neither it nor its original exists."""
    n, candidate = 1, folder
    while candidate.exists() or candidate.with_name(candidate.name + "-original").exists():
        n += 1
        candidate = folder.with_name(f"{folder.name}-{n}")
    return candidate
