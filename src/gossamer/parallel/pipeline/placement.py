"""Training where each process has some of the layers: stages of `torch.distributed.pipelining` behind the interface of `fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from gossamer.errors import UsageError
from gossamer.parallel.data.norms import SynchronisedNorms
from gossamer.parallel.data.replicas import Replicas
from gossamer.parallel.mesh import Mesh
from gossamer.parallel.pipeline.chain import Chain, chain_of
from gossamer.parallel.pipeline.cutting import Cut, cut_chain
from gossamer.parallel.pipeline.microbatches import check_batches, choose_size, pieces, uneven
from gossamer.parallel.pipeline.stages import Stage, stage_of
from gossamer.parallel.planning.costs import Machine, measured_seconds
from gossamer.parallel.skeletons import skeleton_of, whole_parts
from gossamer.sources.batches import Batch
from gossamer.training.averaging import make_average
from gossamer.training.checkpoint import Parts, Progress
from gossamer.training.constraints import HeldZeros
from gossamer.training.feeding import Part

if TYPE_CHECKING:
    from gossamer.training.stepping import Stepper

_LOOPBACK = Machine(bandwidth=1e9)


class Stages(Replicas):
    """Pipeline parallel training; with several data parallel groups, each of which is a whole pipeline.

    Each micro-batch passes the network alone: batch norms see one micro-batch at a time (with data parallel pipelines: the micro-batches of the
    same number in all of them, together), and their running statistics follow in order.

    Args:
        mesh: the processes.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.along = mesh.group("pipeline")
        self.index, self.count = mesh.at("pipeline"), mesh.parallel.pipeline
        self.cut: Cut
        self.stage: Stage
        self.size: int
        self._out_spec: Any
        self._settings: Mapping[str, Any] = {}
        self._template: nn.Module
        self._rest: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}
        self._schedules: dict[int, Any] = {}
        self._steps = 0
        self._judged: tuple[int, int, nn.Module] | None = None
        self._weights: list[float] = []
        self._run: Any = None

    def check(self, settings: Mapping[str, Any]) -> None:
        super().check(settings)
        self._settings = settings
        if settings["precision"] != "fp32":
            raise UsageError(f"pipeline parallel trains in fp32, not {settings['precision']}: leave precision out")
        for name, why in (("penalty", "looks at whole modules"), ("after_step", "is given the whole network")):
            if settings.get(name) is not None:
                raise UsageError(
                    f"{name} {why}, of which each process has a part in pipeline parallel: leave it out, or train data parallel"
                )
        if settings["layer_decay"] != 1.0:
            raise UsageError("layer_decay counts all blocks, of which each process has some in pipeline parallel: leave it out")
        if self.mesh.parallel.shard:
            raise UsageError("pipeline parallel keeps whole stages in each process: leave shard (fsdp) out, or pipeline")

    def wrap(self, run: Stepper, data: Iterable[Any], adapters: nn.Module | None) -> None:
        if adapters is not None and any(True for _ in adapters.parameters()):
            raise UsageError("feature distillation taps layers of all stages: distil logits, or train data parallel")
        self.copy_first(run, adapters, dist.group.WORLD)
        run.channels_last = False
        part = next(iter(data))
        self.size = choose_size(part.total, self.ranks, self.mesh.parallel)
        check_batches(data.data, self.size * self.ranks, run.example_inputs)  # type: ignore[attr-defined]
        batch = run.prepare(part)
        micro = pieces(batch, self.size)[0]
        if micro.args and micro.kwargs:
            raise UsageError("batches mix positional and keyword inputs, which cannot be traced: use one kind")
        chain = chain_of(run.model, micro.args or micro.kwargs)
        self.cut = self._agreed_cut(chain, micro)
        self.stage = stage_of(chain, self.cut, self.index)
        self._out_spec = chain.out_spec
        self._remember(run.model, chain)
        run.model = self.stage.module
        run.model.train()
        self._run = run
        if isinstance(run.after_step, HeldZeros):
            own = dict(run.model.named_parameters())
            run.after_step = run.after_step.mapped(lambda masks: {self._names[n]: m for n, m in masks.items() if self._names[n] in own})
        if run.average is not None:
            run.average = make_average(run.model, float(self._settings["ema"]))

    def _agreed_cut(self, chain: Chain, micro: Batch) -> Cut:
        """The cut that the first process makes from what it measures; the result of a training does not depend on it."""
        problem: list[Any] = [None]
        if self.mesh.is_first:
            inputs = [t for t in pytree.tree_leaves((micro.args, micro.kwargs)) if isinstance(t, Tensor)]
            try:
                problem[0] = cut_chain(chain, self.count, measured_seconds(chain, inputs), _LOOPBACK.bandwidth)
            except UsageError as e:
                problem[0] = e
        dist.broadcast_object_list(problem, src=0, device=self.mesh.device)
        if isinstance(problem[0], UsageError):
            raise problem[0]
        cut: Cut = problem[0]
        return cut

    def _remember(self, model: nn.Module, chain: Chain) -> None:
        """What of the network is in no stage, and which names stand for the same tensor."""
        first: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
            self._names[name] = first.setdefault(id(tensor), name)
        held = {self._names.get(w, w) for w in chain.weights(0, len(chain.operations))}
        self._rest = {n: t.detach().cpu().clone() for n, t in model.state_dict().items() if self._names.get(n, n) not in held}
        self._template = skeleton_of(model)

    def schedule(self, microbatches: int) -> Any:
        """The schedule for a batch of so many micro-batches."""
        if microbatches not in self._schedules:
            stage = PipelineStage(
                self.stage.module,
                self.index,
                self.count,
                self.mesh.device,
                input_args=self.stage.received,
                output_args=self.stage.sent,
                group=self.along,
            )
            kind = ScheduleGPipe if self.mesh.parallel.schedule == "gpipe" else Schedule1F1B
            if kind is Schedule1F1B and microbatches < self.count:
                kind = ScheduleGPipe  # as many in flight either way
            self._schedules[microbatches] = kind(stage, microbatches, loss_fn=self._loss, scale_grads=False)
        return self._schedules[microbatches]

    def _loss(self, output: Any, batch: tuple[Batch, float]) -> Tensor:
        """The objective on what the last stage returned for a micro-batch, times its weight in the gradient."""
        given, weight = batch
        leaves = list(output) if isinstance(output, tuple | list) else [output]
        loss = self._run.objective(_Given(pytree.tree_unflatten(leaves, self._out_spec)), given)
        self._weights.append(float(loss.detach()))
        scaled: Tensor = loss * weight
        return scaled

    def learn(self, run: Stepper, raw: Any, reference: int | None, where: str, *, last: bool) -> tuple[float, int]:
        assert isinstance(raw, Part)
        if raw.total % (self.size * self.ranks):
            raise UsageError(f"{where}: {uneven(raw.total, self.size * self.ranks)}")
        batch = run.prepare(raw)
        given = pieces(batch, self.size)
        weight = self.size / (reference or raw.total)
        inputs = [[pytree.tree_leaves((b.args, b.kwargs))[i] for i in self.stage.needed] for b in given]
        schedule = self.schedule(len(given))
        self._weights = []
        norms = SynchronisedNorms(self.group) if self.ranks > 1 else nullcontext()
        names = [f"given_{n}" for n in self._input_names()]
        with norms:
            schedule.step(
                arg_mbs=[tuple(i) if self.index == 0 else () for i in inputs],
                kwarg_mbs=[{} if self.index == 0 else dict(zip(names, i, strict=True)) for i in inputs],
                target_mbs=[(b, weight) for b in given] if self.index == self.count - 1 else None,
                return_outputs=False,
            )
        self._steps += 1
        if last and self.ranks > 1:
            self._sum_gradients(run.model)
        total = torch.tensor([sum(self._weights) * self.size], dtype=torch.float64, device=self.mesh.device)
        value = float(self.mesh.total(total)) / raw.total
        run.check_finite(value, where)
        return value, raw.total

    def _input_names(self) -> list[str]:
        placeholders = [n.target for n in self.stage.module.graph.nodes if n.op == "placeholder"]
        return [str(n).removeprefix("given_") for n in placeholders[len(placeholders) - len(self.stage.needed) :]]

    def _sum_gradients(self, model: nn.Module) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for dtype in dict.fromkeys(g.dtype for g in gradients):
            some = [g for g in gradients if g.dtype == dtype]
            flat = self.mesh.total(torch.cat([g.flatten() for g in some]), "data")
            for g, piece in zip(some, flat.split([g.numel() for g in some]), strict=True):
                g.copy_(piece.view_as(g))

    def clip(self, parameters: list[Tensor], norm: float) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        mine = torch.tensor(
            [sum(float(g.detach().double().square().sum()) for g in gradients)], dtype=torch.float64, device=self.mesh.device
        )
        total = float(self.mesh.total(mine, "pipeline")) ** 0.5
        if total > norm:
            torch._foreach_mul_(gradients, norm / (total + 1e-6))

    def judge(
        self, run: Stepper, model: nn.Module, raw: Any, metrics: Mapping[str, Callable[[Any, Any], Any]]
    ) -> tuple[dict[str, float], int]:
        if self._judged is None or self._judged[:2] != (id(model), self._steps):
            whole = skeleton_of(self._template, self.mesh.device)
            whole.load_state_dict(self.state(model))
            self._judged = id(model), self._steps, whole.eval()
        return super().judge(run, self._judged[2], raw, metrics)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        found = self._rest | {self._names.get(n, n): t.cpu() for n, t in every(model.state_dict(), self.along).items()}
        return {n: found[self._names.get(n, n)] for n in self._template.state_dict()}

    def whole(self, model: nn.Module, rebuild: Callable[[], nn.Module]) -> nn.Module:
        made = rebuild()
        made.load_state_dict(self.state(model))
        return made

    def contents(self, parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, scalars = super().contents(parts)
        best = {n: t for n, t in tensors.items() if n.startswith("best.")}
        found = every({self._first(n): t for n, t in tensors.items() if n not in best}, self.along)
        for prefix, wanted in (("model.", True), ("ema.module.", "ema" in parts.modules)):
            if wanted:
                found |= {prefix + n: t.clone() for n, t in self._rest.items() if self._names.get(n, n) == n}
        everything: list[Any] = [None] * self.count
        dist.all_gather_object(everything, {self._first(n): v for n, v in scalars.items()}, group=self.along)
        return found | best, {n: v for some in everything for n, v in some.items()}

    def _first(self, name: str) -> str:
        """The name of a tensor in a checkpoint, with a tied one's first name."""
        for prefix in ("model.", "ema.module.", "optimizer.model."):
            if name.startswith(prefix):
                owner, slash, state = name.removeprefix(prefix).partition("/")
                return prefix + self._names.get(owner, owner) + slash + state
        return name

    def restore(self, folder: Path, parts: Parts, settings: dict[str, Any]) -> tuple[Progress, dict[str, Tensor]]:
        whole = whole_parts(self._template, parts, self._settings["ema"])
        found = super().restore(folder, whole, settings)
        self._take(parts.model, whole.model.state_dict())
        average, made = parts.modules.get("ema"), whole.modules.get("ema")
        if isinstance(average, AveragedModel) and isinstance(made, AveragedModel):
            self._take(average.module, made.module.state_dict())
            average.n_averaged.copy_(made.n_averaged)
        of = dict(whole.model.named_parameters(remove_duplicate=False))
        for name, parameter in parts.model.named_parameters():
            for key, value in whole.optimizer.state.get(of[name], {}).items():
                parts.optimizer.state[parameter][key] = value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
        parts.best.update(whole.best)
        return found

    def _take(self, stage: nn.Module, state: dict[str, Tensor]) -> None:
        stage.load_state_dict({n: state[n] for n in stage.state_dict() if n in state}, strict=False)


class _Given(nn.Module):
    """A network whose output is already there."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output


def every(tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """All tensors of all processes of a group, by name; each of them calls it.

    Args:
        tensors: this process's.
        group: the processes.
    """
    sizes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(sizes, [(n, tuple(t.shape), t.dtype) for n, t in tensors.items()], group=group)
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    found: dict[str, Tensor] = {}
    for source, described in enumerate(sizes):
        mine = source == dist.get_rank(group)
        for dtype in dict.fromkeys(d for _, _, d in described):
            some = [(n, torch.Size(s)) for n, s, d in described if d == dtype]
            flat = torch.empty(sum(s.numel() for _, s in some), dtype=dtype, device=device)
            if mine:
                flat.copy_(torch.cat([tensors[n].detach().reshape(-1) for n, _ in some]))
            dist.broadcast(flat, group=group, group_src=source)
            for (n, s), piece in zip(some, flat.split([s.numel() for _, s in some]), strict=True):
                found[n] = piece.reshape(s)
    return found
