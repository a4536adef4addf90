"""State dicts from files: safetensors, or torch files that load without unpickling. Never runs code from a file."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.coding import read_state as read_safetensors
from gossamer.errors import WeightsError, near

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts store the state dict."""
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put in front of every name."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "w.pth"
        >>> torch.save({"state_dict": {"module.bias": torch.ones(2)}}, file)
        >>> read_state(file)
        {'bias': tensor([1., 1.])}

    Args:
        path: a safetensors file, plain or coded (see `gossamer.coding`), or one that ``torch.load(weights_only=True)`` reads. A state
            dict under ``"state_dict"``, ``"model_state_dict"`` or ``"model"`` is unwrapped, and ``"module."`` is taken off where every name has it.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        WeightsError: the file is missing, unreadable, holds something else, or would need unpickling; or a tensor holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        folder = path.parent
        siblings = [str(p) for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
        raise WeightsError(f"there is no weights file {path}{near(str(path), siblings)}")
    raw = _read(path)
    for key in WRAPPERS:
        if isinstance(raw, Mapping) and isinstance(raw.get(key), Mapping):
            raw = raw[key]
    if not isinstance(raw, Mapping) or not raw:
        raise WeightsError(f"{path} holds {'nothing' if isinstance(raw, Mapping) else f'a {type(raw).__name__}'}, not a state dict")
    strange = [str(k) for k, v in raw.items() if not isinstance(v, Tensor)]
    if strange:
        raise WeightsError(f"{path} is not a state dict: {', '.join(strange[:3])} {'is' if len(strange) == 1 else 'are'} not tensors")
    state = {str(k): v.detach() for k, v in raw.items()}
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise WeightsError(f"{path}: {name} holds {bad} values that are NaN or infinite: save the weights again from a sound run")
    return state


def fill(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Copy a state dict into a network, which must have the same names and shapes.

    Examples:
        >>> net = nn.Linear(2, 1)
        >>> fill(net, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, where="w.pth")
        >>> net.weight.tolist()
        [[1.0, 1.0]]

    Args:
        model: changed in place. Counters of batches may be absent from the file; so may a tied tensor that is there under another name.
        state: name -> tensor.
        where: the file, for messages.

    Raises:
        WeightsError: names or shapes differ; the first few are listed with both shapes. The network is then unchanged.
    """
    own = model.state_dict()
    stored = {own[n].data_ptr() for n in state if n in own and own[n].numel()}
    missing = [n for n, t in own.items() if n not in state and not n.endswith("num_batches_tracked") and t.data_ptr() not in stored]
    problems = [
        f"{n} is {_shape(state[n])} in the file and {_shape(own[n])} in the network"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    problems += [f"{n} {_shape(own[n])} is missing from the file" for n in missing]
    problems += [f"{n} {_shape(t)} is not in the network" for n, t in state.items() if n not in own]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise WeightsError(f"{where} does not fit {type(model).__name__} ({len(problems)} tensors differ): {'; '.join(problems[:4])}{more}")
    load_versioned(model, state, strict=False)


def load_versioned(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """``model.load_state_dict``, with the versions of its own modules where the state dict carries none (safetensors hold tensors alone)."""
    versioned = OrderedDict(state)
    versioned._metadata = getattr(state, "_metadata", None) or model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(versioned, strict=strict)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as f:
            head = f.read(9)
        if path.suffix == ".safetensors" or head[8:] == b"{":
            return read_safetensors(path)
    except OSError as e:
        raise WeightsError(f"cannot read weights from {path}: {_one_line(e)}") from None
    if head[:4] != b"PK\x03\x04" and head[:1] != b"\x80":  # a zip archive, or a pickle of protocol 2 or later
        raise WeightsError(f"{path} is neither safetensors nor a torch file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path} holds more than tensors, and reading it would run code from the file: "
            f"save its state dict alone, as safetensors (safetensors.torch.save_file(model.state_dict(), FILE))"
        ) from None
    except Exception as e:  # a broken file makes the restricted unpickler fail in many ways
        raise WeightsError(f"cannot read weights from {path}: {_one_line(e)}") from None


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__
