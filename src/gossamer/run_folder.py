"""Run folders: atomic writes, saving and loading results without pickle, and the checkpoints that a resumed run continues from."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.coding import read_state, save_coded
from gossamer.coding.files import write_safetensors
from gossamer.errors import RunFolderError, SourceError, WeightsError
from gossamer.plan import Mask, Plan, Share
from gossamer.result import Result
from gossamer.sources.weights import load_versioned

PLAN, WEIGHTS, ENVIRONMENT, ONNX, REPORT = "plan.json", "model.safetensors", "environment.json", "model.onnx", "report.json"
PTE = "model.pte"


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file so that a reader sees the old one or the new one, never half of it."""
    return write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as e:
        raise RunFolderError(f"cannot write {path}: {e.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as e:
        Path(temporary).unlink(missing_ok=True)
        raise RunFolderError(f"cannot write {path}: {e.strerror}") from None
    return path


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as safetensors takes it: contiguous, on the CPU, a tied tensor once, under its first name."""
    state: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        state[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return state


def save_weights(model: nn.Module, path: str | Path, *, coded: bool = False) -> Path:
    """Write a network's state dict as safetensors, atomically; ``coded`` makes sparse and shared weights small (see `gossamer.coding`)."""
    return save_coded(state_of(model), path) if coded else write_safetensors(state_of(model), path)


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill ``model`` in place from a file that `save_weights` wrote, coded or not; WeightsError where it does not fit."""
    state = read_state(path)
    own = model.state_dict()
    ties: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in own.items():
        ties.setdefault((tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape)), []).append(name)
    for names in ties.values():
        stored = [n for n in names if n in state]
        if stored:
            state.update({n: state[stored[0]] for n in names if own[n].numel()})
    wrong = [
        f"{n}: file {tuple(state[n].shape)}, network {tuple(own[n].shape)}" for n in own if n in state and state[n].shape != own[n].shape
    ]
    wrong += [f"{n}: missing from the file" for n in own if n not in state] + [f"{n}: not in the network" for n in state if n not in own]
    if wrong:
        raise WeightsError(f"{path} does not fit the network ({len(wrong)} tensors): " + "; ".join(wrong[:3]))
    load_versioned(model, state)
    return model


def save_result(result: Result, folder: str | Path) -> Path:
    """Write what `load` needs: plan, weights and environment. The folder must not hold a result yet.

    Weights that the plan masks or shares are written coded: they take the space that their entropy asks for.
    """
    folder = Path(folder)
    if (folder / PLAN).exists():
        raise RunFolderError(f"{folder} already holds a result: name another folder")
    write_text(folder / ENVIRONMENT, json.dumps(environment(result.source), indent=2) + "\n")
    save_weights(result.model, folder / WEIGHTS, coded=any(isinstance(e, Mask | Share) for e in result.plan.edits))
    result.plan.save(folder / PLAN)
    return folder


def load(run_folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Rebuild the compressed network of a run folder: the source network, the plan, the saved weights.

    Examples:
        >>> import tempfile, torch, gossamer as gs
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> result = gs.prune(net, (torch.randn(3, 4),), ratio=0.5)
        >>> folder = result.save(tempfile.mkdtemp())
        >>> bool((gs.load(folder, net)(torch.ones(1, 4)) == result.model(torch.ones(1, 4))).all())
        True

    Args:
        run_folder: what `compress` or `Result.save` wrote.
        model: the source network, with any weights; needed only where the run was not made from a model specification.

    Returns:
        The network in eval mode. Its outputs equal the saved ones bit for bit on the same machine and versions.

    Raises:
        RunFolderError: no finished run there.
        SourceError: the source network is not known and ``model`` was not given.
        PlanError, WeightsError: ``model`` is not the network the run was made from.
    """
    folder = Path(run_folder)
    if not (folder / PLAN).exists() or not (folder / WEIGHTS).exists():
        raise RunFolderError(f"{folder} holds no finished run: {PLAN} or {WEIGHTS} is missing" + _resume_hint(folder))
    if model is None:
        spec = read_json(folder / ENVIRONMENT).get("model")
        if not spec:
            raise SourceError(f"{folder} was made from a network in memory: pass it, gossamer.load({str(folder)!r}, model)")
        from gossamer.sources import load_model

        model = load_model(spec).model
    return load_weights(Plan.load(folder / PLAN).apply(model, values=False), folder / WEIGHTS).eval()


def _resume_hint(folder: Path) -> str:
    return " (it is unfinished: run compress again with --resume)" if (folder / "checkpoints").exists() else ""


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a run folder; RunFolderError where it is missing or broken."""
    try:
        value = json.loads(Path(path).read_text())
    except OSError as e:
        raise RunFolderError(f"cannot read {path}: {e.strerror}") from None
    except json.JSONDecodeError as e:
        raise RunFolderError(f"{path} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise RunFolderError(f"{path} is not a JSON object")
    return value


def environment(model: str | None = None) -> dict[str, Any]:
    """Versions and hardware, as recorded beside every result."""
    versions = {}
    for name in ("gossamer", "torch", "torchvision", "onnx", "onnxruntime", "onnxscript", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "model": model,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": versions,
    }


def processor() -> str:
    """The CPU's name and the vector extensions that decide how int8 runs on it."""
    name, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    except OSError:
        return name
    known = [f for f in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if f in flags]
    return name + (f" ({', '.join(known)})" if known else "")
