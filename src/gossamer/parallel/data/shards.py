"""Parts of weights, gradients and optimiser state in every process: FSDP, with the results of one process."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, fx, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from gossamer.errors import RunFolderError, UsageError
from gossamer.parallel.data.objective import LossModule
from gossamer.parallel.data.replicas import Replicas
from gossamer.training import checkpoint as checkpoints
from gossamer.training import sharded
from gossamer.training.checkpoint import Parts, Progress

if TYPE_CHECKING:
    from gossamer.training.stepping import Stepper


class Shards(Replicas):
    """Data parallel training in which each process keeps a part of every weight, gradient and optimiser state.

    The blocks of the network are put together when they are needed, one after another; with ``precision="bf16"`` in bf16, batch norms in fp32.
    """

    def check(self, settings: Mapping[str, Any]) -> None:
        super().check(settings)
        if settings.get("optimizer") not in ("adamw", "sgd"):
            raise UsageError(f"optimizer={settings.get('optimizer')!r} needs whole weights: with fsdp use adamw or sgd, or ddp")
        if settings.get("precision") == "fp16":
            raise UsageError("precision='fp16' does not combine with fsdp: use bf16, or ddp")
        if settings.get("penalty") is not None:
            raise UsageError("a penalty needs whole weights: it does not combine with fsdp, use ddp")
        if settings.get("after_step") is not None:
            raise UsageError(
                "what changes weights after each step (schedules of sparsity, projections, quantisation-aware training) needs whole weights: "
                "it does not combine with fsdp, use ddp"
            )

    def wrap(self, run: Stepper, data: Iterable[Any], adapters: nn.Module | None) -> None:
        self._call = LossModule(run, adapters, self.mesh.rank)
        run.channels_last = False  # parts of weights are contiguous
        for name, p in run.model.named_parameters():
            if not p.dim():
                raise UsageError(f"{name} is a number without dimensions, which fsdp cannot divide: use ddp")
        self.copy_first(run, adapters)
        for module in (run.model, run.average, adapters):
            for p in module.parameters() if module is not None else ():
                p.data = p.data.contiguous()
        called = _called(run, run.prepare(next(iter(data))))
        self._shard(run.model, called, run.precision)
        if run.average is not None:
            self._shard(run.average.module, called, run.precision)
        for adapter in adapters.children() if adapters is not None else ():
            if any(True for _ in adapter.parameters()):
                _shard_one(adapter, mesh=self.mesh.device_mesh["data"])
        self._adapters = [a for a in (adapters.children() if adapters is not None else ()) if isinstance(a, FSDPModule)]
        self._model = run.model

    def _shard(self, model: nn.Module, called: Counter[str], precision: str) -> None:
        mesh = self.mesh.device_mesh["data"]
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = half if precision == "bf16" else MixedPrecisionPolicy()
        if precision == "bf16":
            for name, module in model.named_modules():
                if isinstance(module, _BatchNorm) and module.affine and called[name] == 1:
                    _shard_one(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        for name in blocks_to_shard(model, called):
            _shard_one(model.get_submodule(name), mesh=mesh, mp_policy=policy)
        _shard_one(model, mesh=mesh, mp_policy=policy)

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        for module in (self._model, *self._adapters):
            assert isinstance(module, FSDPModule)
            module.set_requires_gradient_sync(last)
        yield

    def clip(self, parameters: list[Tensor], norm: float) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        total = torch.nn.utils.get_total_norm(grads)
        whole = total.full_tensor() if isinstance(total, DTensor) else total
        torch.nn.utils.clip_grads_with_norm_(parameters, norm, whole)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        return {k: _whole(v).to(torch.device("cpu"), copy=True) for k, v in model.state_dict().items()}

    def whole(self, model: nn.Module, rebuild: Callable[[], nn.Module]) -> nn.Module:
        plain = rebuild()
        plain.load_state_dict(self.state(model))
        others = dict(model.named_buffers())
        for name, buffer in plain.named_buffers():
            buffer.copy_(others[name])
        return plain

    def restore(self, folder: Path, parts: Parts, settings: dict[str, Any]) -> tuple[Progress, dict[str, Tensor]]:
        path, _ = checkpoints.last_good(folder, checkpoints.verify)
        header = checkpoints.read_header(path)
        progress = checkpoints.agreed_progress(path, header, settings)
        stored = checkpoints.shapes_of(path)
        targets, states = self._targets(parts, stored)
        wrong = [n for n in targets if n not in stored or stored[n][0] != tuple(targets[n].shape)]
        wrong += [n for n in stored if n not in targets and not n.startswith("random.")]
        if wrong:
            raise RunFolderError(f"{path} was made with another network: {', '.join(wrong[:3])} does not fit")
        if path.is_dir():
            sharded.read_parts(path, targets)
        else:
            with safe_open(path, "pt") as f:
                for name, target in targets.items():
                    _fill(target, f.get_tensor(name))
        checkpoints.fill_optimizer(parts, states, header)
        parts.best.update({n.removeprefix("best."): t for n, t in targets.items() if n.startswith("best.")})
        return progress, self.own_generators({n.removeprefix("random."): t for n, t in targets.items() if n.startswith("random.")})

    def _targets(self, parts: Parts, stored: Mapping[str, tuple[tuple[int, ...], Any]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What to fill: all that is there, and an optimiser's state, which is not there before its first step."""
        targets, _ = self.contents(parts)
        parameters = checkpoints.named_parameters(parts)
        states: dict[str, Tensor] = {}
        for name, (shape, dtype) in stored.items():
            key = name.removeprefix("optimizer.")
            owner = parameters.get(key.rpartition("/")[0])
            if key != name and owner is not None:
                alike = shape == tuple(owner.shape)
                states[key] = torch.zeros_like(owner, requires_grad=False) if alike else torch.zeros(shape, dtype=dtype)
                targets[name] = states[key]
            elif name.startswith("best.") or name == f"random.cpu.{self.mesh.rank}" or name == f"random.cuda.{self.mesh.rank}":
                targets[name] = torch.zeros(shape, dtype=dtype)
        return targets, states


def blocks_to_shard(model: nn.Module, called: Mapping[str, int]) -> list[str]:
    """The outermost numbered modules that run once in a forward pass and share no parameter with others; of a graph none.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> blocks_to_shard(net, {"0": 1, "1": 1, "2": 1})
        ['0', '2']
    """
    if isinstance(model, fx.GraphModule):
        return []
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    found: list[str] = []
    for name, module in model.named_modules():
        inside = [p for m in module.modules() for p in m._parameters.values() if p is not None]
        alone = all(owners[i] == n for i, n in Counter(map(id, inside)).items())
        numbered = re.fullmatch(r"(.*\.)?(\w*_)?\d+", name)
        if numbered and inside and alone and called.get(name) == 1 and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def _shard_one(module: nn.Module, **options: Any) -> None:
    """``fully_shard``, with outputs that are no views: an operation in place on a view would lose FSDP's hook."""
    module.register_forward_hook(lambda _module, _args, out: pytree.tree_map(_own, out))
    fully_shard(module, **options)


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.requires_grad and value._is_view() else value


def _called(run: Stepper, batch: Any) -> Counter[str]:
    """How often each module is called in a forward pass; in eval mode, nothing stays."""
    calls: Counter[str] = Counter()
    modes = [(m, m.training) for m in run.model.modules()]

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    handles = [m.register_forward_pre_hook(count(n)) for n, m in run.model.named_modules()]
    try:
        run.model.eval()
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []), torch.no_grad():
            run.objective(run.model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return calls


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _fill(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, or this process's part of it, into a target."""
    if isinstance(target, DTensor):
        part = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(whole)
