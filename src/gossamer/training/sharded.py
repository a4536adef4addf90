"""Checkpoints that several processes write together: Distributed Checkpoint's safetensors shards, which any number of processes reads again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from gossamer.errors import RunFolderError
from gossamer.run_folder import write_text

HEADER = "training.json"
"""All that is not a tensor, and the checksums of the shards."""


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A state dict with a tied parameter once, under its first name; parts of tensors stay parts."""
    first: dict[int, str] = {}
    tied: set[str] = set()
    for name, p in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(p), name) != name:
            tied.add(name)
    return {name: tensor.detach() for name, tensor in module.state_dict().items() if name not in tied}


def save_shards(folder: Path, name: str, previous: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a checkpoint, all processes together; a reader sees the previous one or this one, never half of it.

    Args:
        folder: made where it does not exist; all processes see the same.
        name, previous: folders in it: of this checkpoint, and of the one before, which is kept.
        tensors: what this process holds, by name: whole tensors, or parts of them as DTensors.
        header: as JSON takes it; the first process's counts.

    Raises:
        RunFolderError: in all processes, where one of them cannot write.
    """
    rank = dist.get_rank()
    temporary = folder / f".{name}.tmp"
    with _together(folder):
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    whole = {n: t if hasattr(t, "device_mesh") else t.contiguous() for n, t in tensors.items()}
    with _together(folder), _quiet():
        dcp.save(whole, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    sums: list[Any] = [None] * dist.get_world_size()
    with _together(folder):
        mine = {p.name: _settled(p) for p in sorted(temporary.glob(f"shard-{rank + 1:05d}-*"))}
    dist.all_gather_object(sums, mine)
    with _together(folder):
        if rank == 0:
            checksums = {n: c for part in sums for n, c in part.items()}
            write_text(temporary / HEADER, json.dumps({"header": header, "shards": checksums}))
            shutil.rmtree(folder / previous, ignore_errors=True)
            if (folder / name).exists():
                os.replace(folder / name, folder / previous)
            os.replace(temporary, folder / name)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a checkpoint; ValueError, KeyError, TypeError or OSError where it is damaged."""
    header: dict[str, Any] = json.loads((path / HEADER).read_text())["header"]
    return header


def verify(path: Path) -> None:
    """ValueError where a shard is missing or its checksum does not hold."""
    for name, checksum in json.loads((path / HEADER).read_text())["shards"].items():
        if not (path / name).is_file() or _checksum(path / name) != checksum:
            raise ValueError(f"the checksum of {name} does not hold")


def shapes_of(path: Path) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each tensor, by name."""
    found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: (tuple(m.size), m.properties.dtype) for name, m in found.items()}  # type: ignore[union-attr]


def read_whole(path: Path) -> dict[str, Tensor]:
    """All tensors, whole, by this process alone."""
    import torch

    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes_of(path).items()}
    with _quiet():
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    return tensors


def read_parts(path: Path, targets: dict[str, Tensor]) -> None:
    """Fill tensors, whole or parts, in place; all processes together, each with its own targets."""
    with _quiet():
        dcp.load(dict(targets), storage_reader=HuggingFaceStorageReader(str(path)))


@contextlib.contextmanager
def _together(folder: Path) -> Iterator[None]:
    """What all processes do, and all fail where one does."""
    problem = ""
    try:
        yield
    except (OSError, SafetensorError, RunFolderError, dcp.api.CheckpointException) as e:
        problem = " ".join(str(e).split())[:300] or type(e).__name__
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    wrong = next((p for p in found if p), None)
    if wrong:
        raise RunFolderError(f"cannot write a checkpoint into {folder}: {wrong}; the last one that was written is kept")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Distributed Checkpoint's remarks on what it is used for."""
    log = logging.getLogger("torch.distributed.checkpoint")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _settled(path: Path) -> str:
    with path.open("rb") as f:
        os.fsync(f.fileno())
    return _checksum(path)


def _checksum(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
