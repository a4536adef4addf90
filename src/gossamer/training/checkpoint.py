"""Checkpoints of a training run: a safetensors file, replaced atomically, with a checksum; scalars are JSON in its header. No pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.errors import RunFolderError, UsageError, WeightsError
from gossamer.run_folder import state_of
from gossamer.sources.weights import fill

FILE = "training.safetensors"
"""The last checkpoint in a folder."""
PREVIOUS = "training.previous.safetensors"
"""The one before it, in case the last is damaged."""
SHARDS = "training.shards"
"""The last checkpoint that several processes wrote: a folder of safetensors files."""
PREVIOUS_SHARDS = "training.previous.shards"
"""The one before it."""
DAMAGE = (OSError, SafetensorError, KeyError, TypeError, ValueError)
"""What reading a damaged checkpoint raises."""


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


@dataclass
class Parts:
    """Everything that a checkpoint holds besides progress.

    Attributes:
        model: the network in training.
        optimizer: over its parameters.
        modules: further modules with a state of their own, by name: the average of the weights, a distillation's adapters.
        scaler: of fp16, or None.
        best: weights of the best epoch so far; empty where none are kept.
    """

    model: nn.Module
    optimizer: Optimizer
    modules: dict[str, nn.Module] = field(default_factory=dict)
    scaler: torch.amp.GradScaler | None = None
    best: dict[str, Tensor] = field(default_factory=dict)


def exists(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint."""
    return bool(found_in(folder))


def found_in(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, the last one first; those whose progress cannot be read come before all others."""
    paths = [folder / name for name in (FILE, SHARDS, PREVIOUS, PREVIOUS_SHARDS) if (folder / name).exists()]
    return sorted(paths, key=_age)


def _age(path: Path) -> tuple[int, int]:
    try:
        progress = read_header(path)["progress"]
        return -int(progress["epoch"]), -int(progress["step"])
    except DAMAGE:
        return (-(2**62), 0)


def save(folder: Path, parts: Parts, progress: Progress, settings: dict[str, Any]) -> None:
    """Write a checkpoint: a reader sees the previous one or this one, never half of it. The previous one is kept beside it.

    Args:
        folder: made where it does not exist.
        parts: their states are stored.
        progress: stored, with the state of the random generators where an epoch has begun.
        settings: what a resumed run must agree with.

    Raises:
        RunFolderError: the folder cannot be written.
        UsageError: a weight is NaN or infinite; the last good checkpoint stays.
    """
    tensors = {f"model.{name}": tensor for name, tensor in state_of(parts.model).items()}
    check_finite(parts.model)
    for key, module in parts.modules.items():
        tensors |= {f"{key}.{name}": tensor for name, tensor in state_of(module).items()}
    tensors |= {f"best.{name}": tensor.clone().contiguous() for name, tensor in parts.best.items()}
    states, scalars = optimizer_state(parts)
    tensors |= {f"optimizer.{name}": value.detach().to("cpu", copy=True).contiguous() for name, value in states.items()}
    if progress.step:
        tensors["random.cpu"] = torch.get_rng_state()
        device = _device(parts.model)
        if device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    header = json.dumps(header_of(parts, progress, settings, scalars))
    temporary = folder / f".{FILE}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"gossamer": header, "checksum": checksum(header, tensors)})
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        if (folder / FILE).exists():
            os.replace(folder / FILE, folder / PREVIOUS)
            for name in (SHARDS, PREVIOUS_SHARDS):
                shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(temporary, folder / FILE)
    except (OSError, SafetensorError) as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunFolderError(f"cannot write a checkpoint into {folder}: {e}; the last one that was written is kept") from None


def header_of(parts: Parts, progress: Progress, settings: dict[str, Any], scalars: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds besides tensors; ``scalars`` are those of the optimiser."""
    scaler = parts.scaler.state_dict() if parts.scaler is not None else None
    return {"progress": asdict(progress), "settings": settings, "optimizer": scalars, "scaler": scaler}


def optimizer_state(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and scalars of an optimiser's state, by the name of the parameter and of the state: ``"model.head.bias/exp_avg"``."""
    names = {id(p): name for name, p in named_parameters(parts).items()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter in _parameters(parts.optimizer):
        for key, value in parts.optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{names[id(parameter)]}/{key}"] = value
    return tensors, scalars


def named_parameters(parts: Parts) -> dict[str, Tensor]:
    """The parameters of the network and of what is trained with it, by name."""
    found: dict[str, Tensor] = {f"model.{name}": p for name, p in parts.model.named_parameters()}
    for key, module in parts.modules.items():
        if key != "ema":
            found |= {f"{key}.{name}": p for name, p in module.named_parameters()}
    return found


def restore(folder: Path, parts: Parts, settings: dict[str, Any]) -> tuple[Progress, dict[str, Tensor]]:
    """Fill network, optimiser and the rest from a checkpoint; from the one before where the last is damaged, with a warning.

    Args:
        folder: what `save` wrote.
        parts: changed in place.
        settings: of this run.

    Returns:
        How far it is, and the states of the random generators where an epoch had begun: ``cpu``, ``cuda``, and ``cpu.RANK`` of processes.

    Raises:
        RunFolderError: no file is readable, or it was made with other settings or another network.
    """
    path, (header, tensors) = last_good(folder, _read)
    progress = agreed_progress(path, header, settings)
    try:
        fill(parts.model, _part(tensors, "model."), where=str(path))
        for key, module in parts.modules.items():
            fill(module, _part(tensors, f"{key}."), where=str(path))
    except WeightsError as e:
        raise RunFolderError(f"{path} was made with another network: {e}") from None
    fill_optimizer(parts, _part(tensors, "optimizer."), header)
    parts.best.update(_part(tensors, "best."))
    return progress, _part(tensors, "random.")


def agreed_progress(path: Path, header: dict[str, Any], settings: dict[str, Any]) -> Progress:
    """How far a checkpoint is; RunFolderError where it was made with other settings."""
    try:
        progress = Progress(**header["progress"])
        theirs = header["settings"]
    except (KeyError, TypeError) as e:
        raise RunFolderError(f"{path} is not a checkpoint of this version: {e}; remove it to start again") from None
    settings = json.loads(json.dumps(settings))  # tuples as JSON gives them back
    differ = [k for k in settings | theirs if settings.get(k) != theirs.get(k)]
    if differ:
        detail = ", ".join(f"{k} is {theirs.get(k)!r} there and {settings.get(k)!r} here" for k in differ[:3])
        raise RunFolderError(f"{path} cannot be resumed with other settings: {detail}; use the same, or another folder")
    return progress


def checksum(header: str, tensors: dict[str, Tensor]) -> str:
    """A hash of everything in a checkpoint.

    Examples:
        >>> checksum("{}", {"w": torch.zeros(2)}) == checksum("{}", {"w": torch.ones(2)})
        False
    """
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        if tensors[name].numel():
            digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(model: nn.Module) -> None:
    """UsageError that names the first parameter with a NaN or an infinity in it."""
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"{name} became NaN or infinite: no checkpoint was written over the last good one; lower lr")


def read_header(path: Path) -> dict[str, Any]:
    """All of a checkpoint that is not a tensor; one of `DAMAGE` where it cannot be read."""
    if path.is_dir():
        from gossamer.training import sharded

        return sharded.read_header(path)
    with safe_open(path, "pt") as f:
        header: dict[str, Any] = json.loads((f.metadata() or {})["gossamer"])
    return header


def last_good(folder: Path, read: Callable[[Path], Any]) -> tuple[Path, Any]:
    """The newest checkpoint that can be read, and what ``read``, which raises `DAMAGE`, made of it."""
    damaged = ""
    for path in found_in(folder):
        try:
            found = read(path)
        except DAMAGE as e:
            damaged = damaged or f"{path} is damaged or of another version ({e})"
            continue
        if damaged:
            warnings.warn(f"{damaged}: continuing from the checkpoint before it", stacklevel=5)
        return path, found
    raise RunFolderError(f"{damaged}, and there is no good one before it; remove it to start again")


def verify(path: Path) -> None:
    """One of `DAMAGE` where a checkpoint's checksum does not hold."""
    if path.is_dir():
        from gossamer.training import sharded

        sharded.verify(path)
    else:
        _read(path)


def shapes_of(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor in a checkpoint, by name."""
    if path.is_dir():
        from gossamer.training import sharded

        return sharded.shapes_of(path)
    with safe_open(path, "pt") as f:
        tensors = ((n, f.get_tensor(n)) for n in f.keys())  # noqa: SIM118
        return {n: (tuple(t.shape), t.dtype) for n, t in tensors}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a checkpoint whose checksum holds."""
    if path.is_dir():
        from gossamer.training import sharded

        sharded.verify(path)
        return sharded.read_header(path), sharded.read_whole(path)
    with safe_open(path, "pt") as f:
        metadata = f.metadata() or {}
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    if checksum(metadata["gossamer"], tensors) != metadata["checksum"]:
        raise ValueError("its checksum does not hold")
    return json.loads(metadata["gossamer"]), tensors


def fill_optimizer(parts: Parts, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """As each optimiser made it, of its own type: ``load_state_dict`` would turn 8-bit state into floats."""
    optimizer, parameters = parts.optimizer, named_parameters(parts)
    fused = {id(p) for g in optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]}
    for name, value in (*tensors.items(), *header["optimizer"].items()):
        owner, _, key = name.rpartition("/")
        if owner not in parameters:
            raise RunFolderError(
                f"the checkpoint holds an optimiser's state of {name!r}, of another version or network: remove it to start again"
            )
        parameter = parameters[owner]
        if isinstance(value, Tensor) and (key != "step" or id(parameter) in fused):
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value
    if parts.scaler is not None and header.get("scaler"):
        parts.scaler.load_state_dict(header["scaler"])


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
