"""One-shot pruning of pretrained MobileNetV2 without training: with and without compensation, at several fractions of the MACs."""

from __future__ import annotations

import time

import torch
from _photographs import arguments, load

import gossamer as gs
from gossamer.profiling import evaluate


def main() -> None:
    """Print the table."""
    loaded, calibration, evaluation = load(arguments(__doc__ or ""))
    example = (torch.zeros(1, 3, 224, 224),)
    print(f"MobileNetV2, {torch.get_num_threads()} threads, torch {torch.__version__}; 100 photographs for calibration, nothing trained")
    print(f"original: {evaluate(loaded.model, evaluation)}")
    print(f"{'MACs':>6} {'compensated':>12} {'top-1':>32} {'MACs reached':>13} {'proof':>9} {'took':>7}")
    for macs in (0.9, 0.8, 0.7):
        for compensate in (False, True):
            started = time.perf_counter()
            result = gs.prune(loaded.model, example, macs=macs, calibration=calibration, compensate=compensate)
            took = time.perf_counter() - started
            found = evaluate(result.model, evaluation).accuracy
            assert found is not None
            assert result.proof is not None
            top1 = f"{found.value:.1%} ({found.interval[0]:.1%} to {found.interval[1]:.1%})"
            reached = result.after.macs / result.before.macs
            print(
                f"{macs:6.2f} {'yes' if compensate else 'no':>12} {top1:>32} {reached:13.3f} {result.proof.difference:9.1e} {took:6.0f}s",
                flush=True,
            )


if __name__ == "__main__":
    main()
