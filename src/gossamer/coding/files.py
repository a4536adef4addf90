"""Weight files: plain safetensors, or safetensors that hold coded weights; the metadata tells them apart."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.coding.coder import VERSION, decode, encode
from gossamer.errors import RunFolderError, WeightsError

FORMAT = "gossamer-coded"


def save_coded(state: Mapping[str, Tensor], path: str | Path) -> Path:
    """Write a state dict as an entropy-coded safetensors file, atomically.

    Examples:
        >>> import tempfile, torch
        >>> file = save_coded({"weight": torch.zeros(1000, 1000)}, Path(tempfile.mkdtemp()) / "w.safetensors")
        >>> file.stat().st_size < 1000
        True
        >>> read_state(file)["weight"].shape
        torch.Size([1000, 1000])

    Args:
        state: name -> tensor, as `encode` takes it.
        path: the file; folders above it are made. A reader sees the old file or the new one.

    Returns:
        The path.

    Raises:
        RunFolderError: the file cannot be written.
        WeightsError: an entry cannot be coded.
    """
    return write_safetensors(encode(state), path, {"format": f"{FORMAT} {VERSION}"})  # one entry: several are written in any order


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file, plain or coded.

    Examples:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> file = Path(tempfile.mkdtemp()) / "plain.safetensors"
        >>> save_file({"bias": torch.ones(2)}, file)
        >>> read_state(file)
        {'bias': tensor([1., 1.])}

    Args:
        path: a file that `save_coded` or ``safetensors.torch.save_file`` wrote.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        WeightsError: the file is missing, damaged, cut short, or was written by a newer version of the format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        kind, _, version = metadata.get("format", "").partition(" ")
        if kind != FORMAT:
            return load_file(path)
        if version != str(VERSION):
            raise WeightsError(f"format version {version} of coded weights: this gossamer reads version {VERSION}, install a newer one")
        return decode(load_file(path))
    except (OSError, SafetensorError, WeightsError) as e:
        raise WeightsError(f"cannot read {path}: {' '.join(str(e).split())[:200]}") from None


def write_safetensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Write tensors as safetensors so that a reader sees the old file or the new one; RunFolderError where that is not possible."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), temporary, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunFolderError(f"cannot write {path}: {e}") from None
    return path
