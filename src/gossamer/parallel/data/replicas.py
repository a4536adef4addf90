"""Copies of the network in every process, each with its part of every batch: DDP, with the results of one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gossamer.errors import UsageError
from gossamer.parallel.data.norms import SynchronisedNorms
from gossamer.parallel.data.objective import LossModule
from gossamer.parallel.data.slices import Shared
from gossamer.parallel.mesh import Mesh, restarted
from gossamer.training import checkpoint as checkpoints
from gossamer.training import sharded
from gossamer.training.checkpoint import Parts, Progress
from gossamer.training.feeding import Part
from gossamer.training.placement import Placement
from gossamer.training.precision import autocast
from gossamer.training.validation import figures_of

if TYPE_CHECKING:
    from gossamer.training.stepping import Stepper


class Replicas(Placement):
    """Data parallel training with a copy of the network in each process.

    The gradient of a step is that of the whole batch: each sample counts once, whatever the size of a part. Batch norms see the whole batch.

    Args:
        mesh: the processes.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.first = mesh.is_first
        self.restarted = restarted()
        self.group = mesh.group("data")
        self.rank, self.ranks = mesh.at("data"), mesh.parallel.data
        self._call: Callable[..., Any] | None = None

    def on(self, device: torch.device) -> torch.device:
        return self.mesh.device

    def check(self, settings: Mapping[str, Any]) -> None:
        for name in ("memory_budget", "measure_memory"):
            if settings.get(name):
                raise UsageError(f"{name} measures steps in one process: it does not combine with parallel (use smaller batches, or fsdp)")
        if settings.get("optimizer_in_backward"):
            raise UsageError("optimizer_in_backward updates before gradients are summed over processes: it does not combine with parallel")

    def share(self, data: Iterable[Any]) -> Shared:
        self._agree(len(data) if isinstance(data, Sized) else 0)
        return Shared(data, self.rank, self.ranks, agree=self._agree)

    def seed(self, data: Iterable[Any], seed: int, epoch: int, device: torch.device) -> None:
        assert isinstance(data, Shared)
        data.seed(seed, epoch, device)

    def wrap(self, run: Stepper, data: Iterable[Any], adapters: nn.Module | None) -> None:
        self.copy_first(run, adapters)
        run.prepare(next(iter(data)))  # the memory layout, which DDP's buckets take over
        self._call = self.wrapped(LossModule(run, adapters, self.mesh.rank), run)

    def copy_first(self, run: Stepper, adapters: nn.Module | None, group: dist.ProcessGroup | None = None) -> None:
        """Start from the first process's weights and buffers, whatever the others of a group were given; default: those that share batches."""
        for module in (run.model, run.average, adapters):
            for tensor in (*module.parameters(), *module.buffers()) if module is not None else ():
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, group=group or self.group, group_src=0)
                tensor.detach().copy_(whole)

    def wrapped(self, loss: LossModule, run: Stepper) -> nn.Module:
        """What computes the loss and sums the gradients over the processes."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the new name of broadcast_buffers is not in all versions
            return DistributedDataParallel(
                loss,
                process_group=self.group,
                broadcast_buffers=False,  # those of batch norms are the same everywhere, others are broadcast where they change
                find_unused_parameters=True,  # heads that a loss leaves out
                gradient_as_bucket_view=True,
            )

    def learn(self, run: Stepper, raw: Any, reference: int | None, where: str, *, last: bool) -> tuple[float, int]:
        assert isinstance(raw, Part) and self._call is not None
        before = _versions(run.model)
        batch = run.prepare(raw)
        norms = SynchronisedNorms(self.group, counts=raw.n > 0)
        with self.accumulating(last=last):
            with norms, autocast(run.device, run.precision):
                loss, minimised = self._call(batch)
            value = self.mean(loss, raw)
            run.check_finite(value, where)
            run.scaled(minimised * (raw.n * self.ranks / (reference or raw.total))).backward()
        self._level(run.model, before, norms.buffers)
        return value, raw.total

    def accumulating(self, *, last: bool) -> Any:
        """A context in which gradients are summed over processes only where the step follows."""
        assert isinstance(self._call, DistributedDataParallel)
        return nullcontext() if last else self._call.no_sync()

    def mean(self, loss: Tensor, part: Part) -> float:
        """A loss over the whole batch, from the means of the parts."""
        own = loss.item() * part.n if part.n else 0.0
        return float(self.mesh.total(torch.tensor([own], dtype=torch.float64, device=loss.device), "data")) / part.total

    def judge(
        self, run: Stepper, model: nn.Module, raw: Any, metrics: Mapping[str, Callable[[Any, Any], Any]]
    ) -> tuple[dict[str, float], int]:
        assert isinstance(raw, Part)
        figures = figures_of(run, model, run.prepare(raw), metrics)
        return (figures if raw.n else dict.fromkeys(figures, 0.0)), raw.n

    def total(self, sums: dict[str, float]) -> dict[str, float]:
        values = torch.tensor([sums[k] for k in sorted(sums)], dtype=torch.float64, device=self.mesh.device)
        return dict(zip(sorted(sums), self.mesh.total(values, "data").tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        return self.mesh.any(flag)

    def save(self, folder: Path, parts: Parts, progress: Progress, settings: dict[str, Any]) -> None:
        if self.any(not _finite(parts.model)):
            checkpoints.check_finite(parts.model)
            raise UsageError("a weight became NaN or infinite: no checkpoint was written over the last good one; lower lr")
        tensors, scalars = self.contents(parts)
        if progress.step:
            tensors |= {f"random.{k}.{self.mesh.rank}": state for k, state in self.generators().items()}
        header = checkpoints.header_of(parts, progress, settings, scalars) | {"processes": self.mesh.world}
        sharded.save_shards(folder, checkpoints.SHARDS, checkpoints.PREVIOUS_SHARDS, tensors, header)
        if self.first and (folder / checkpoints.PREVIOUS_SHARDS).exists():
            for name in (checkpoints.FILE, checkpoints.PREVIOUS):
                (folder / name).unlink(missing_ok=True)

    def contents(self, parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What this process has of network, optimiser and the rest: tensors (whole, or parts as DTensors) by name, and scalars of the optimiser."""
        states, scalars = checkpoints.optimizer_state(parts)
        tensors = {f"optimizer.{name}": t.detach() for name, t in states.items()}
        for key, module in {"model": parts.model, **parts.modules}.items():
            tensors |= {f"{key}.{name}": t for name, t in sharded.state_tensors(module).items()}
        return tensors | {f"best.{name}": t for name, t in parts.best.items()}, scalars

    def restore(self, folder: Path, parts: Parts, settings: dict[str, Any]) -> tuple[Progress, dict[str, Tensor]]:
        progress, generators = checkpoints.restore(folder, parts, settings)
        return progress, self.own_generators(generators)

    def generators(self) -> dict[str, Tensor]:
        """States of this process's random generators."""
        states = {"cpu": torch.get_rng_state()}
        return states | ({"cuda": torch.cuda.get_rng_state(self.mesh.device)} if self.mesh.device.type == "cuda" else {})

    def own_generators(self, generators: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's, of those in a checkpoint; none where it was written by another number of processes."""
        if sum(name.startswith("cpu.") for name in generators) != self.mesh.world:
            return {}
        return {name: generators[f"{name}.{self.mesh.rank}"] for name in ("cpu", "cuda") if f"{name}.{self.mesh.rank}" in generators}

    def _agree(self, number: int) -> None:
        """UsageError where processes read other batches."""
        pair = torch.tensor([number, -number], dtype=torch.int64, device=self.mesh.device)
        dist.all_reduce(pair, op=dist.ReduceOp.MAX)
        if int(pair[0]) != -int(pair[1]):
            raise UsageError(
                "the processes would read different batches: give all of them the same data, and a sampler that draws from torch's generators"
            )

    def _level(self, model: nn.Module, before: dict[str, tuple[int, int]], synchronised: set[int]) -> None:
        """Give all processes the first one's buffers, of those that changed by other means than batch norm."""
        after = _versions(model)
        buffers = dict(model.named_buffers())
        changed = [buffers[n] for n in after if after[n] != before.get(n) and id(buffers[n]) not in synchronised]
        changed = [b for b in changed if b.is_floating_point() and b.numel()]
        if changed:
            dist._broadcast_coalesced(self.group, changed, 2**28, 0)


def _finite(model: nn.Module) -> bool:
    own = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())  # the part that this process has
    return all(bool(torch.isfinite(p).all()) for p in own)


def _versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(b), b._version) for name, b in model.named_buffers()}
