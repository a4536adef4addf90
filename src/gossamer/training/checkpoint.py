"""Checkpoints of a training run: one safetensors file, replaced atomically; scalars are JSON in its header. No pickle."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.errors import RunFolderError, WeightsError
from gossamer.run_folder import state_of
from gossamer.sources.weights import fill

FILE = "training.safetensors"
"""The one file in a checkpoint folder."""


@dataclass
class Progress:
    """How far training is.

    Attributes:
        epoch: epochs that are done.
        step: steps of the next epoch that are done.
        loss_sum: sum over the samples of those steps.
        samples: of those steps.
        seconds: spent so far, over all sittings.
        history: one record for each epoch that is done.
        log_start: bytes of the log before this training began, or None where there is no log.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    log_start: int | None = None


def exists(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint."""
    return (folder / FILE).is_file()


def save(folder: Path, model: nn.Module, optimizer: Optimizer, progress: Progress, settings: dict[str, Any]) -> None:
    """Write a checkpoint: a reader sees the previous one or this one, never half of it.

    Args:
        folder: made where it does not exist.
        model: its state dict is stored.
        optimizer: its state is stored.
        progress: stored, with the state of the random generators where an epoch has begun.
        settings: what a resumed run must agree with.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    tensors = {f"model.{name}": tensor for name, tensor in state_of(model).items()}
    scalars: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                scalars[f"{index}.{key}"] = value
    if progress.step:
        tensors["random.cpu"] = torch.get_rng_state()
        device = _device(model)
        if device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    header = json.dumps({"progress": asdict(progress), "settings": settings, "optimizer": scalars})
    temporary = folder / f".{FILE}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"gossamer": header})
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, folder / FILE)
    except (OSError, SafetensorError) as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunFolderError(f"cannot write a checkpoint into {folder}: {e}") from None


def restore(folder: Path, model: nn.Module, optimizer: Optimizer, settings: dict[str, Any]) -> tuple[Progress, dict[str, Tensor]]:
    """Fill network and optimiser from a checkpoint.

    Args:
        folder: what `save` wrote.
        model, optimizer: changed in place.
        settings: of this run.

    Returns:
        How far it is, and the states of the random generators (``cpu``, ``cuda``) where an epoch had begun.

    Raises:
        RunFolderError: the file is unreadable, or was made with other settings or another network.
    """
    path = folder / FILE
    try:
        with safe_open(path, "pt") as f:
            header = json.loads((f.metadata() or {})["gossamer"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        progress = Progress(**header["progress"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise RunFolderError(f"{path} is not a checkpoint of this version: {e}; remove it to start again") from None
    theirs = header["settings"]
    differ = [k for k in settings | theirs if settings.get(k) != theirs.get(k)]
    if differ:
        detail = ", ".join(f"{k} is {theirs.get(k)!r} there and {settings.get(k)!r} here" for k in differ[:3])
        raise RunFolderError(f"{path} cannot be resumed with other settings: {detail}; use the same, or another folder")
    try:
        fill(model, _part(tensors, "model."), where=str(path))
    except WeightsError as e:
        raise RunFolderError(f"{path} was made with another network: {e}") from None
    _restore_optimizer(optimizer, _part(tensors, "optimizer."), header["optimizer"])
    return progress, _part(tensors, "random.")


def _restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *scalars.items()):
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
