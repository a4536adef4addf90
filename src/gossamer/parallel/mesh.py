"""The processes of a training as a mesh of pipeline x data x tensor, and the end of all of them when one is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from gossamer.errors import GossamerError, PeerLost, UsageError
from gossamer.parallel.options import Parallel, launched

DIMS = ("pipeline", "data", "tensor")
"""Dimensions of the mesh, the slowest first: tensor parallel processes are neighbours."""
_ATTEMPT = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
_LAST_WORDS = f"gossamer/last-words/{_ATTEMPT}"
_STORES: list[dist.Store] = []  # the one of this process, then one for each start


@dataclass(frozen=True)
class Mesh:
    """Where this process stands among the others.

    Attributes:
        parallel: the degrees.
        device_mesh: of three dimensions, `DIMS`.
        device: of this process.
        rank, world: of this process, and how many there are.
    """

    parallel: Parallel
    device_mesh: DeviceMesh
    device: torch.device
    rank: int
    world: int

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and draws progress."""
        return self.rank == 0

    def group(self, dim: str) -> dist.ProcessGroup:
        """The processes that differ from this one in a dimension alone."""
        return self.device_mesh.get_group(dim)

    def at(self, dim: str) -> int:
        """Position of this process in a dimension."""
        return self.device_mesh.get_local_rank(dim)

    def total(self, values: Tensor, dim: str | None = None) -> Tensor:
        """Sum of a tensor over the processes of a dimension, or over all, in place; the same bits everywhere."""
        dist.all_reduce(values, group=self.group(dim) if dim is not None else None)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process says yes."""
        votes = torch.tensor([float(flag)], device=self.device)
        return bool(self.total(votes) > 0)


def restarted() -> bool:
    """Whether torchrun started this process again after one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def device_of(device: torch.device) -> torch.device:
    """The device of this process: of GPUs the one with its local rank."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextmanager
def start(parallel: Parallel, device: torch.device | str = "cpu") -> Iterator[Mesh]:
    """Meet the other processes: those of torchrun, or of a process group that is there already, which then stays.

    Args:
        parallel: its degrees multiply to the number of processes.
        device: CPU (gloo), or ``"cuda"`` (NCCL), where each process takes the one of its local rank.

    Returns:
        A context with the `Mesh`. An error in it is told to the others, and all of them end.

    Raises:
        UsageError: torchrun started none, or other than ``parallel.world`` processes.
        PeerLost: another process died, or did not answer for ``parallel.timeout_s``.
    """
    device = device_of(torch.device(device))
    world = launched(_named(parallel), parallel.world)
    if world != parallel.world:
        raise UsageError(
            f"parallel {_named(parallel)} needs {parallel.world} processes, and there are {world}: "
            f"start it with torchrun --nproc-per-node {parallel.world} ..."
        )
    ours = not dist.is_initialized()
    rank = int(os.environ["RANK"]) if ours else dist.get_rank()
    store: Any = None
    with _lost_becomes_one_line(lambda: store):
        if ours:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            backend = "nccl" if device.type == "cuda" else "gloo"
            options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
            patience = timedelta(seconds=parallel.timeout_s)
            dist.init_process_group(backend, store=_meeting_point(patience), rank=rank, world_size=world, timeout=patience, **options)
        store = dist.distributed_c10d._get_default_store()
        sizes = (parallel.pipeline, parallel.data, parallel.tensor)
        try:
            mesh = Mesh(parallel, init_device_mesh(device.type, sizes, mesh_dim_names=DIMS), device, rank, world)
            for dim in DIMS if ours else ():  # torch gives groups of a part of the processes half an hour
                _set_timeout(timedelta(seconds=parallel.timeout_s), mesh.group(dim))
            yield mesh
        except BaseException as e:
            _leave_word(store, rank, e)
            raise
        finally:
            if ours:
                with suppress(RuntimeError):
                    dist.destroy_process_group()


def _set_timeout(patience: timedelta, group: dist.ProcessGroup) -> None:
    setting: Any = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # its name before torch 2.14
    setting(patience, group)


def _meeting_point(patience: timedelta) -> dist.Store:
    """Torchrun's store, with names of its own for each start: those of an earlier one would lead to processes that are gone."""
    if not _STORES:
        _STORES.append(next(iter(rendezvous("env://", timeout=patience)))[0])
    _STORES.append(dist.PrefixStore(f"gossamer/{_ATTEMPT}/{len(_STORES)}", _STORES[0]))
    return _STORES[-1]


@contextmanager
def _lost_becomes_one_line(store: Any) -> Iterator[None]:
    try:
        yield
    except (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError) as e:
        raise PeerLost(_lost(e, store())) from e
    except RuntimeError as e:
        if isinstance(e, GossamerError) or not _is_connection(e):
            raise
        raise PeerLost(_lost(e, store())) from e


def _is_connection(e: RuntimeError) -> bool:
    """Whether an error of gloo, which has no type of its own, is about another process."""
    text = str(e)
    signs = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting", "gloo/transport", "Connection refused")
    return any(sign in text for sign in signs)


def _lost(e: Exception, store: Any) -> str:
    late = "imed out" in str(e)
    what = "another process did not answer in time" if late else "another process ended"
    return (
        f"{_last_words(store) or what}, and so this one stops; torchrun --max-restarts N starts all of them again, and training with a "
        "checkpoint folder then continues from the last checkpoint"
    )


def _leave_word(store: Any, rank: int, e: BaseException) -> None:
    """Tell the others why this process ends."""
    if isinstance(e, PeerLost | SystemExit) or (isinstance(e, RuntimeError) and _is_connection(e)):
        return
    said = " ".join(str(e).split())[:300] or type(e).__name__
    with suppress(Exception):
        store.set(_LAST_WORDS, f"process {rank} ended with {type(e).__name__}: {said}")


def _last_words(store: Any) -> str:
    with suppress(Exception):
        if store is not None and store.check([_LAST_WORDS]):
            return str(store.get(_LAST_WORDS).decode())
    return ""


def _named(parallel: Parallel) -> str:
    data = "fsdp" if parallel.shard else "ddp"
    degrees = {data: parallel.data, "tp": parallel.tensor, "pp": parallel.pipeline}
    return "+".join(f"{kind},{n}" for kind, n in degrees.items() if n > 1) or "ddp,1"
