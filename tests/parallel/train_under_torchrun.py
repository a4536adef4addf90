"""A slow small training that saves after every second step: what torchrun starts in tests, and what meets trouble."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from networks_to_divide import network, rows

import gossamer as gs
from gossamer.errors import GossamerError, UsageError
from gossamer.run_folder import save_weights
from gossamer.training import TrainingStopped


def train(folder: Path, trouble: str = "none") -> None:
    """Six epochs of ten steps; in the fifth step there may be trouble in process 1. The first process writes its weights."""
    rank = os.environ["RANK"]

    def slow(_model: torch.nn.Module, seen: list[int] = [0]) -> None:  # noqa: B006
        seen[0] += 1
        time.sleep(0.02)
        if rank != "1" or seen[0] != 5:
            return
        if trouble == "hang":
            time.sleep(8)
        if trouble == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if trouble == "error":
            raise UsageError("the disk of process 1 is on fire")

    parallel = gs.Parallel(data=2)
    options = {"epochs": 6, "lr": 1e-2, "checkpoint": folder / "checkpoints", "checkpoint_every": 2, "log": folder / "log.jsonl"}
    net = torch.nn.Sequential(network("mlp"), torch.nn.Dropout(0.2))  # whose random numbers are part of the checkpoints
    result = gs.fit(net, rows(), after_step=slow if trouble != "undisturbed" else None, parallel=parallel, **options)
    if rank == "0":
        save_weights(result.model, folder / "model.safetensors")


def one_line(_rank: int, folder: str, trouble: str) -> tuple[str, str, float]:
    """How a training ends: the type of what it raises (`TrainingStopped` is a SystemExit with 0), the message, and after how many seconds."""
    began = time.monotonic()
    try:
        train(Path(folder), trouble)
    except (GossamerError, TrainingStopped) as e:
        return type(e).__name__, str(e), time.monotonic() - began
    return "", "", time.monotonic() - began


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    (out / f"pid-{os.environ['RANK']}-{os.environ['TORCHELASTIC_RESTART_COUNT']}").write_text(str(os.getpid()))
    train(out)
