"""Start real gloo processes for a test: forked from a server that has torch imported already, so that a start takes no time."""

from __future__ import annotations

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *(
            "torch._dynamo",
            "torch.distributed.fsdp",
            "torch.distributed.tensor",
            "torch.distributed.checkpoint.hf_storage",
            "torch._inductor",
        ),
        *("gossamer.parallel.data", "gossamer.training.sharded", "gossamer.models", "gossamer.distillation", "gossamer.flow.steps"),
        *("gossamer.sparsity", "gossamer.sharing", "gossamer.quantization.training", "gossamer.exporting", "networks_to_divide"),
    ]
)


def run(work: Callable[..., Any], ranks: int, folder: Path, *args: Any, timeout_s: float = 120, patience_s: float = 60) -> list[Any]:
    """What ``work(rank, *args)`` returns in each of several processes of one process group; an error of any of them fails the test."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [_SERVER.Process(target=_child, args=(work, rank, ranks, folder, args, patience_s)) for rank in range(ranks)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(timeout_s)
    hung = [i for i, p in enumerate(processes) if p.is_alive()]
    for p in processes:
        p.kill()
    errors = [f"process {rank}:\n{(folder / f'error-{rank}').read_text()}" for rank in range(ranks) if (folder / f"error-{rank}").exists()]
    assert not errors and not hung, "\n".join(errors) or f"processes {hung} hang"
    return [torch.load(folder / f"out-{rank}", weights_only=False) for rank in range(ranks)]


def _child(work: Callable[..., Any], rank: int, ranks: int, folder: Path, args: tuple[Any, ...], patience_s: float) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    try:
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=patience_s))
        torch.manual_seed(0)
        torch.save(work(rank, *args), folder / f"out-{rank}")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise
