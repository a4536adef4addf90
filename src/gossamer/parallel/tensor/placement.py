"""Training where processes share every layer: `gossamer.parallel.tensor` behind the interface of `fit`, with data parallel around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from gossamer.errors import UsageError
from gossamer.parallel.data.replicas import Replicas
from gossamer.parallel.mesh import Mesh
from gossamer.parallel.skeletons import skeleton_of, whole_parts
from gossamer.parallel.tensor.split import SplitNetwork, split_network
from gossamer.result import ExampleInputs
from gossamer.sources.batches import Batch
from gossamer.training.averaging import make_average
from gossamer.training.checkpoint import Parts, Progress
from gossamer.training.codebooks import Codebook
from gossamer.training.constraints import HeldZeros
from gossamer.training.layout import set_layout
from gossamer.training.placement import Placement

if TYPE_CHECKING:
    from gossamer.training.stepping import Stepper

_ELEMENTWISE = ("adamw", "sgd")


class Shares(Replicas):
    """Tensor parallel training; with several data parallel groups, each of which has the whole network.

    Args:
        mesh: the processes.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.split: SplitNetwork
        self._skeleton: nn.Module
        self._settings: Mapping[str, Any] = {}

    def check(self, settings: Mapping[str, Any]) -> None:
        super().check(settings)
        self._settings = settings
        if settings["optimizer"] not in _ELEMENTWISE:
            raise UsageError(
                f"optimizer={settings['optimizer']!r} looks at whole weights, of which each process has a part in tensor parallel: "
                f"use {' or '.join(_ELEMENTWISE)}"
            )
        if settings.get("penalty") is not None:
            raise UsageError("a penalty looks at whole channels, which tensor parallel splits: leave it out, or train data parallel")
        if settings.get("after_step") is not None:
            raise UsageError("after_step is given whole weights, which tensor parallel splits: leave it out, or train data parallel")
        if settings["precision"] == "fp16":
            raise UsageError("fp16 scales the loss by what one process sees: use bf16 with tensor parallel")
        if self.mesh.parallel.shard:
            raise UsageError("tensor parallel keeps whole shares in each process: leave shard (fsdp) out, or tensor")

    def wrap(self, run: Stepper, data: Iterable[Any], adapters: nn.Module | None) -> None:
        if adapters is not None and any(True for _ in adapters.parameters()):
            raise UsageError("feature distillation taps whole layers, which tensor parallel splits: distil logits, or train data parallel")
        if any(isinstance(m, Codebook) for m in run.model.modules()):
            raise UsageError("tensor parallel does not split weights that share values of a codebook: train data or pipeline parallel")
        self.copy_first(run, adapters, dist.group.WORLD)
        example = example_of(run.prepare(next(iter(data))))
        set_layout(run.model, False)
        self._skeleton = skeleton_of(run.model)
        self.split = split_network(run.model, example, self.mesh.group("tensor"), agreeing=dist.group.WORLD)
        run.model = self.split.model
        if isinstance(run.after_step, HeldZeros):
            run.after_step = run.after_step.mapped(lambda masks: self.split.layout.share(masks, self.split.ranks.rank))
        if run.channels_last:
            set_layout(run.model, True)
        if run.average is not None:
            run.average = make_average(run.model, float(self._settings["ema"]))
        if self.ranks > 1:
            super().wrap(run, data, adapters)

    def learn(self, run: Stepper, raw: Any, reference: int | None, where: str, *, last: bool) -> tuple[float, int]:
        if self.ranks > 1:
            return super().learn(run, raw, reference, where, last=last)
        return Placement.learn(self, run, raw, reference, where, last=last)

    def clip(self, parameters: list[Tensor], norm: float) -> None:
        split = {id(p) for n, p in self.split.model.named_parameters() if n in self.split.layout.shapes}
        squares = {True: 0.0, False: 0.0}
        learned = [p for p in parameters if p.grad is not None]
        for p in learned:
            assert p.grad is not None
            squares[id(p) in split] += float(p.grad.detach().double().square().sum())
        mine = torch.tensor([squares[True]], dtype=torch.float64, device=self.mesh.device)
        total = (float(self.mesh.total(mine, "tensor")) + squares[False]) ** 0.5
        if total > norm:
            torch._foreach_mul_([p.grad for p in learned if p.grad is not None], norm / (total + 1e-6))

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        whole = self.split.layout.gather(model.state_dict(), self.split.ranks)
        return {k: v.to("cpu", copy=True) for k, v in whole.items()}

    def whole(self, model: nn.Module, rebuild: Callable[[], nn.Module]) -> nn.Module:
        made = rebuild()
        made.load_state_dict(self.state(model))
        return made

    def contents(self, parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, scalars = super().contents(parts)
        shapes = {n: t.shape for n, t in parts.model.state_dict().items()}
        kinds: dict[str, dict[str, str]] = {}  # what a tensor is of its owner -> owner -> name
        for name, tensor in tensors.items():
            for prefix in ("model.", "ema.module.", "optimizer.model."):
                owner, _, state = name.removeprefix(prefix).partition("/")
                if name.startswith(prefix) and shapes.get(owner) == tensor.shape:
                    kinds.setdefault(prefix + state, {})[owner] = name
        for owners in kinds.values():
            whole = self.split.layout.gather({owner: tensors[name] for owner, name in owners.items()}, self.split.ranks)
            tensors |= {owners[owner]: tensor for owner, tensor in whole.items()}
        return tensors, scalars

    def restore(self, folder: Path, parts: Parts, settings: dict[str, Any]) -> tuple[Progress, dict[str, Tensor]]:
        whole = whole_parts(self._skeleton, parts, self._settings["ema"])
        found = super().restore(folder, whole, settings)
        self.split.load_state_dict(whole.model.state_dict())
        average, made = parts.modules.get("ema"), whole.modules.get("ema")
        if isinstance(average, AveragedModel) and isinstance(made, AveragedModel):
            average.module.load_state_dict(self.split.layout.share(made.module.state_dict(), self.split.ranks.rank))
            average.n_averaged.copy_(made.n_averaged)
        own = dict(parts.model.named_parameters())
        for name, parameter in whole.model.named_parameters():
            for key, value in whole.optimizer.state.get(parameter, {}).items():
                of_shape = isinstance(value, Tensor) and value.shape == parameter.shape
                mine = self.split.layout.share({name: value}, self.split.ranks.rank)[name].to(own[name].device) if of_shape else value
                parts.optimizer.state[own[name]][key] = mine
        parts.best.update(whole.best)
        return found


def example_of(batch: Batch, rows: int = 2) -> ExampleInputs:
    """Example inputs from the first rows of a batch."""
    if batch.args and batch.kwargs:
        raise UsageError("batches mix positional and keyword inputs, which cannot be traced: use one kind")
    given: Any = tuple(batch.args) if batch.args else dict(batch.kwargs)
    n = next((len(t) for t in pytree.tree_leaves(given) if isinstance(t, Tensor) and t.dim()), 0)
    return pytree.tree_map(lambda t: t[:rows] if isinstance(t, Tensor) and t.dim() and len(t) == n else t, given)
