"""Every way to split a training over many processes: memory, what is sent, time of a step; counted, before anything is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from gossamer.errors import NothingToDo, UsageError
from gossamer.parallel.options import Parallel
from gossamer.parallel.planning.costs import BACKWARD, Machine
from gossamer.parallel.planning.layout import Laid, messages, ring_bytes
from gossamer.result import ExampleInputs
from gossamer.sources.batches import check_inputs

STATE = {"adamw": 2.0, "sgd": 1.0}
"""Optimiser state, in sizes of the weights (SGD with momentum)."""

TENSOR, PIPELINE = 8, 32
"""Largest degrees that are looked at."""

_BUCKET = 25e6
_UPDATE = 4.0
"""Sizes of the weights that an update reads and writes, besides twice the optimiser's state."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the process that needs most.

    Attributes:
        weights: with buffers; under FSDP its part, and the largest layer whole.
        gradients, optimizer: of the trained weights.
        activations: kept for the backward pass, of all micro-batches that are under way.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Split:
    """One way to split a training, and what a step of it takes.

    Attributes:
        parallel: the degrees.
        memory: of the process that needs most.
        sent_bytes: by one process in one step, by dimension: ``"data"``, ``"tensor"``, ``"pipeline"``.
        seconds: of one step.
        compute_seconds: of the slowest process in it, without waiting.
        bubble: fraction of the pipeline's time in which a stage has nothing to do.
        efficiency: seconds of one process for the whole batch, over those of all processes.
        fits: whether its memory is within that of the machine.
        cut: names of the operations at which stages begin.
    """

    parallel: Parallel
    memory: Memory
    sent_bytes: dict[str, float]
    seconds: float
    compute_seconds: float
    bubble: float
    efficiency: float
    fits: bool
    cut: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class ParallelPlan:
    """All splits of a training.

    Attributes:
        world: processes.
        batch_size: samples of a step, over all of them.
        machine: what each process has.
        optimizer: whose state is counted.
        splits: those that fit, fastest first; then the others.
        one: the same training in one process.
        notes: why some splits are missing.
    """

    world: int
    batch_size: int
    machine: Machine
    optimizer: str
    splits: tuple[Split, ...]
    one: Split
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Split | None:
        """The fastest that fits."""
        return next((s for s in self.splits if s.fits), None)

    def __str__(self) -> str:
        from gossamer.parallel.planning.showing import plan_table

        return plan_table(self)


class Planner:
    """Plans trainings of one network; what is counted of it is kept between them.

    Args:
        model: the network; it stays as it is.
        example_inputs: of a few samples: a tuple of positional inputs, or a dict of keyword inputs.
        optimizer: ``"adamw"`` or ``"sgd"``.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, *, optimizer: str = "adamw") -> None:
        if optimizer not in STATE:
            raise UsageError(f"optimizer={optimizer!r}: the planner knows the state of {' and '.join(STATE)}")
        self.model, self.example_inputs, self.optimizer = model, check_inputs(example_inputs), optimizer
        self._laid: dict[int, Laid | str] = {}
        self._balances: dict[tuple[int, int, float, Machine], Any] = {}

    def laid(self, tensor: int) -> Laid | str:
        """The network's share for a tensor degree, or why there is none."""
        if tensor not in self._laid:
            try:
                self._laid[tensor] = Laid.of(self.model, self.example_inputs, tensor)
            except NothingToDo as e:
                self._laid[tensor] = str(e)
        return self._laid[tensor]

    def plan(self, *, world: int, batch_size: int, machine: Machine, microbatches: int | None = None) -> ParallelPlan:
        """See `plan_parallel`."""
        if world < 1 or batch_size < 1:
            raise UsageError(f"a plan needs world >= 1 and batch_size >= 1, not {world} and {batch_size}")
        one = self.split(Parallel(), batch_size, machine, None)
        assert isinstance(one, Split)
        found: list[Split] = []
        notes: dict[str, None] = {}
        for parallel in _degrees(world):
            made = self.split(parallel, batch_size, machine, microbatches)
            if isinstance(made, Split):
                found.append(replace(made, efficiency=one.seconds / (made.seconds * world)))
            else:
                notes[made] = None
        if not found:
            raise NothingToDo(f"there is no way to split it over {world} processes: {'; '.join(list(notes)[:3])}")
        found.sort(key=lambda s: (not s.fits, s.seconds))
        return ParallelPlan(world, batch_size, machine, self.optimizer, tuple(found), one, tuple(notes))

    def split(self, parallel: Parallel, batch_size: int, machine: Machine, microbatches: int | None) -> Split | str:
        """What a step takes with these degrees, or why there is none."""
        laid = self.laid(parallel.tensor)
        if isinstance(laid, str):
            return laid
        d, p = parallel.data, parallel.pipeline
        if batch_size % d:
            return f"a batch of {batch_size} is not divided equally among {d} data parallel processes"
        own = batch_size // d
        m = 1
        if p > 1:
            wanted = microbatches or next(k for k in range(min(4 * p, own), 0, -1) if own % k == 0)
            if own % wanted:
                return f"{own} samples of a process are not {wanted} equal micro-batches"
            m = wanted
            parallel = replace(parallel, microbatches=m)
        micro = own / m
        positions: tuple[int, ...] = (0, len(laid.chain.operations))
        if p > 1:
            key = (parallel.tensor, p, micro, machine)
            if key not in self._balances:
                self._balances[key] = laid.balance(machine, micro, p)
            if self._balances[key].most < p:
                return f"it cannot be cut into {p} stages, {self._balances[key].most} at most"
            positions = self._balances[key].positions(p)
        return self._counted(parallel, laid, positions, m, micro, machine)

    def _counted(self, parallel: Parallel, laid: Laid, positions: tuple[int, ...], m: int, micro: float, machine: Machine) -> Split:
        d, p, shard = parallel.data, parallel.pipeline, parallel.shard
        scale = micro / laid.work.batch
        spans = list(pairwise(positions))

        def per_stage(values: np.ndarray) -> np.ndarray:
            return np.array([values[i:j].sum() for i, j in spans])

        weights, buffers = per_stage(laid.weights), per_stage(laid.buffers)
        crossing = laid.crossing[list(positions)] * scale
        handed = 2 * (crossing[:-1] + crossing[1:]) / machine.bandwidth
        computing = per_stage(laid.work.seconds(machine, micro))
        summing = per_stage(laid.summing(machine, micro))
        stage = computing + summing + handed
        rounds = m + p - 1
        passing = rounds * float(stage.max())
        data, waited = _gradients(weights, per_stage(laid.norms), d, m, shard, machine)
        waited = np.maximum(waited - machine.overlap * BACKWARD / (1 + BACKWARD) * m * computing, 0)
        part = d if shard else 1
        updated = weights / part * (_UPDATE + 2 * STATE[self.optimizer]) / machine.memory_bandwidth
        seconds = passing + float((waited + updated).max())
        under_way = np.array([min(p - s, m) if parallel.schedule == "1f1b" else m for s in range(p)])
        kept = per_stage(laid.work.kept) * scale * under_way
        gathered = float(laid.weights.max()) if shard else 0.0
        state = STATE[self.optimizer]
        worst = int(np.argmax(weights / part * (2 + state) + buffers + kept))
        memory = Memory(
            float(weights[worst] / part + buffers[worst]) + gathered,
            float(weights[worst] / part),
            float(weights[worst] / part * state),
            float(kept[worst]),
        )
        sent = {
            "data": float(data.max()),
            "tensor": float(np.max(ring_bytes(per_stage(laid.summed) * scale * m, parallel.tensor))),
            "pipeline": float((crossing[:-1] + crossing[1:]).max()) * m,
        }
        fits = machine.memory_bytes is None or memory.total <= machine.memory_bytes
        names = tuple(laid.chain.operations[i].name for i, _ in spans) if p > 1 else ()
        return Split(parallel, memory, sent, seconds, m * float(computing.max()), (p - 1) / rounds, 1.0, fits, names)


def plan_parallel(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    world: int,
    batch_size: int,
    machine: Machine | None = None,
    optimizer: str = "adamw",
    microbatches: int | None = None,
) -> ParallelPlan:
    """Every way to split a training over processes: memory, what is sent, and predicted time of a step.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 10))
        >>> plan = plan_parallel(net, (torch.zeros(2, 512),), world=2, batch_size=64, machine=Machine(bandwidth=1e9))
        >>> len(plan.splits), plan.best.fits, plan.best.parallel.world
        (4, True, 2)

    Args:
        model: the network; it stays as it is.
        example_inputs: of a few samples: a tuple of positional inputs, or a dict of keyword inputs.
        world: processes, at least 1.
        batch_size: samples of a step over all processes, at least 1.
        machine: what each process has; default: `Machine()`.
        optimizer: whose state is counted, ``"adamw"`` or ``"sgd"`` (with momentum).
        microbatches: of a pipeline; default: four for each stage where they divide the batch.

    Returns:
        A `ParallelPlan`; it prints as a table.

    Raises:
        UsageError: an argument outside its range.
        NothingToDo: no split is possible.
        ExportError: the network cannot be written as one graph.

    Source: counts as in Rajbhandari et al. 2020, arXiv:1910.02054 (memory), Shoeybi et al. 2019, arXiv:1909.08053 (tensor), Narayanan et al.
        2021, arXiv:2104.04473 (bubble and schedules).
    """
    return Planner(model, example_inputs, optimizer=optimizer).plan(
        world=world, batch_size=batch_size, machine=machine or Machine(), microbatches=microbatches
    )


def _degrees(world: int) -> Iterator[Parallel]:
    """What `fit` can do: data alone (whole copies, or shards), and data around tensor or pipeline."""
    for inner in (n for n in range(1, world + 1) if world % n == 0):
        data = world // inner
        if inner == 1:
            yield Parallel(data=data)
            if data > 1:
                yield Parallel(data=data, shard=True)
            continue
        if inner <= TENSOR:
            yield Parallel(data=data, tensor=inner)
        if inner <= PIPELINE:
            yield Parallel(data=data, pipeline=inner)


def _gradients(weights: np.ndarray, norms: np.ndarray, d: int, m: int, shard: bool, machine: Machine) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that each stage's processes send for gradients (and weights, under FSDP), and seconds; batch norms wait for one another too."""
    if d == 1:
        return np.zeros_like(weights), np.zeros_like(weights)
    moved = np.asarray(ring_bytes(weights, d)) * (1.5 if shard else 1.0)  # gathered twice and scattered once, of twice around
    rounds = np.ceil(weights / _BUCKET) * messages(d)
    waiting = norms * 2 * m * messages(d)
    return moved, moved / machine.bandwidth + (rounds + waiting) * machine.latency_s
