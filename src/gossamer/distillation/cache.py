"""A teacher's outputs on disk, one row a sample, found by the sample's content: no order of a loader can mix them up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.errors import RunFolderError, SourceError, UsageError
from gossamer.run_folder import read_json, write_text
from gossamer.sources.batches import Batch
from gossamer.training.feeding import samples_of, tensors_of

KEY_BYTES = 16


class TeacherCache:
    """Outputs of a teacher by sample. A sample's key is a hash of its inputs, so that shuffling, batch size and epochs do not matter.

    Augmented samples are new ones in each epoch: they are computed as without a cache, and fill the disk. Rows are appended; a row that was
    cut off by a kill is computed again.

    Args:
        folder: made where it does not exist; belongs to this one teacher.
        teacher: whose outputs they are; a cache of other weights is refused.

    Raises:
        RunFolderError: the folder holds another teacher's outputs, or cannot be written.
    """

    def __init__(self, folder: str | Path, teacher: nn.Module) -> None:
        self.folder = Path(folder)
        self.teacher = fingerprint(teacher)
        self.index: dict[bytes, int] = {}
        self.shape: tuple[int, ...] | None = None
        self.computed = self.reused = 0
        if (self.folder / "cache.json").exists():
            self._open()

    def __len__(self) -> int:
        return len(self.index)

    def outputs(self, batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
        """The teacher's outputs for a batch, on its device.

        Args:
            batch: N samples.
            compute: gives the outputs (N, ...); called only where a sample of the batch is not there yet.

        Raises:
            SourceError: the outputs have not one row for each sample.
        """
        keys = keys_of(batch)
        if not all(key in self.index for key in keys):
            fresh = compute(batch)
            if not fresh.dim() or fresh.shape[0] != len(keys):
                raise SourceError(
                    f"a teacher's outputs are cached by sample, but {len(keys)} samples gave {tuple(fresh.shape)}: no cache then"
                )
            self._append(keys, fresh)
        else:
            self.reused += len(keys)
        assert self.shape is not None
        width = int(np.prod(self.shape, dtype=np.int64))
        rows = np.memmap(self.folder / "rows.f32", np.float32, "r", shape=(len(self.index), width))
        found = torch.from_numpy(rows[[self.index[key] for key in keys]].copy())
        device = next((t.device for t in tensors_of(batch)), torch.device("cpu"))
        return found.reshape(len(keys), *self.shape).to(device)

    def _append(self, keys: list[bytes], fresh: Tensor) -> None:
        values = fresh.detach().float().cpu().reshape(len(keys), -1).numpy()
        if self.shape is None:
            self.shape = tuple(fresh.shape[1:])
            write_text(self.folder / "cache.json", json.dumps({"teacher": self.teacher, "shape": self.shape}) + "\n")
        if tuple(fresh.shape[1:]) != self.shape:
            raise SourceError(
                f"the teacher gave outputs of {tuple(fresh.shape[1:])}, those in {self.folder} are of {self.shape}: no cache then"
            )
        new: dict[bytes, int] = {}
        for position, key in enumerate(keys):
            if key not in self.index and key not in new:
                new[key] = position
        try:  # rows first: a key without its row cannot be
            with (self.folder / "rows.f32").open("ab") as f:
                f.write(values[list(new.values())].tobytes())
            with (self.folder / "keys.bin").open("ab") as f:
                f.write(b"".join(new))
        except OSError as e:
            raise RunFolderError(f"cannot write the teacher's outputs into {self.folder}: {e.strerror}") from None
        self.index |= {key: len(self.index) + i for i, key in enumerate(new)}
        self.computed += len(new)

    def _open(self) -> None:
        header = read_json(self.folder / "cache.json")
        if header.get("teacher") != self.teacher:
            raise RunFolderError(f"{self.folder} holds the outputs of another teacher: name another folder, or remove it")
        self.shape = tuple(header["shape"])
        width = 4 * int(np.prod(self.shape, dtype=np.int64))
        keys, rows = self.folder / "keys.bin", self.folder / "rows.f32"
        if not keys.exists() or not rows.exists():
            keys.write_bytes(b"")
            rows.write_bytes(b"")
        n = min(keys.stat().st_size // KEY_BYTES, rows.stat().st_size // width)
        for path, size in ((keys, KEY_BYTES), (rows, width)):  # what a kill cut off
            with path.open("r+b") as f:
                f.truncate(n * size)
        packed = keys.read_bytes()
        self.index = {packed[KEY_BYTES * i : KEY_BYTES * (i + 1)]: i for i in range(n)}


def keys_of(batch: Batch) -> list[bytes]:
    """A hash of each sample's inputs.

    Examples:
        >>> keys = keys_of(Batch((torch.tensor([[1.0], [2.0], [1.0]]),), {}, None))
        >>> keys[0] == keys[2], keys[0] == keys[1]
        (True, False)
    """
    n = samples_of(batch)
    digests = [hashlib.blake2b(digest_size=KEY_BYTES) for _ in range(n)]
    for tensor in tensors_of(batch):
        if not tensor.dim() or tensor.shape[0] != n:
            raise UsageError(f"a cache by sample needs inputs with one row a sample, not {tuple(tensor.shape)} beside {n} samples")
        rows = np.ascontiguousarray(tensor.detach().cpu().contiguous().reshape(n, -1).view(torch.uint8).numpy())
        head = f"{tensor.dtype}{tuple(tensor.shape[1:])}".encode()
        for digest, row in zip(digests, rows, strict=True):
            digest.update(head)
            digest.update(row.data)
    return [d.digest() for d in digests]


def fingerprint(model: nn.Module) -> str:
    """A hash of a network's weights and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    state: dict[str, Any] = model.state_dict()
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.numel():
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
