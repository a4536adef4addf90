"""A network that runs inside one buffer."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gossamer.errors import UsageError
from gossamer.memory.kernels import Bound

if TYPE_CHECKING:
    from gossamer.memory.plan import MemoryPlan

POISON = 0xFF  # four of them are a NaN


class Arena:
    """One buffer, and the calls that run a plan inside it."""

    def __init__(self, plan: MemoryPlan) -> None:
        self._plan = plan
        self.memory = torch.empty(max(1, plan.arena_bytes), dtype=torch.uint8)
        bound = Bound(plan.program, plan.lives, plan.offsets, self.memory)
        self.inputs, self.outputs, self.calls = bound.inputs, bound.outputs, bound.calls
        self.flat = [call for calls in self.calls for call in calls]

    def run(self, values: list[Any]) -> list[Any]:
        """Copy the inputs in, make the calls, copy the outputs out."""
        for place, value in zip(self.inputs, values, strict=True):
            if place is not None:
                place.copy_(value)
        for call in self.flat:
            call()
        return [o.clone() if isinstance(o, Tensor) else o for o in self.outputs]

    def run_poisoned(self, values: list[Any]) -> list[Any]:
        """The same, with every byte overwritten that is not in use: before the first step, and each after its last."""
        self.memory.fill_(POISON)
        ends: dict[int, list[Tensor]] = {}
        for life, offset in zip(self._plan.lives, self._plan.offsets, strict=True):
            ends.setdefault(life.last, []).append(self.memory[offset : offset + life.size])
        for place, value in zip(self.inputs, values, strict=True):
            if place is not None:
                place.copy_(value)
        for i, calls in enumerate(self.calls):
            for call in calls:
                call()
            for part in ends.get(i, []):
                part.fill_(POISON)
        return [o.clone() if isinstance(o, Tensor) else o for o in self.outputs]


class ArenaModule(nn.Module):
    """A network in eval mode, in float32 on CPU, that runs inside one preallocated buffer; what `MemoryPlan.compile` returns.

    Call it like the network. Threads may call it at the same time: each takes an arena from a pool, which grows as needed. Another batch size
    is planned when it first comes, and kept.

    Attributes:
        plan: of the example inputs.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        super().__init__()
        self.plan = plan
        self._plans: dict[Any, MemoryPlan] = {plan.signature: plan.packed()}
        self._pool: dict[Any, list[Arena]] = {plan.signature: [Arena(self._plans[plan.signature])]}
        self._lock = threading.Lock()
        self.eval()

    @property
    def idle_arenas(self) -> int:
        """How many arenas wait for a call."""
        return sum(map(len, self._pool.values()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's outputs for inputs of a planned or new batch size."""
        return self._run(args, kwargs, "run")

    def run_poisoned(self, *args: Any, **kwargs: Any) -> Any:
        """Like a call, but every byte of the arena is overwritten before and after its use: the output must be the same."""
        return self._run(args, kwargs, "run_poisoned")

    def _run(self, args: Any, kwargs: Any, how: str) -> Any:
        """One call in an arena from the pool, which takes it back; ``how`` is the arena's method."""
        values = self.plan.leaves(args, kwargs)
        signature = tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in values)
        with self._lock:
            free = self._pool.get(signature)
            arena = free.pop() if free else None
        if arena is None:
            arena = self._new(signature, values)
        with torch.no_grad():
            found = getattr(arena, how)(values)
        with self._lock:
            self._pool.setdefault(signature, []).append(arena)
        return pytree.tree_unflatten(found, self.plan.output_spec)

    def _new(self, signature: Any, values: list[Any]) -> Arena:
        """An arena for inputs of these shapes, planned where they are new."""
        with self._lock:
            plan = self._plans.get(signature)
        if plan is None:
            plan = self.plan.for_inputs(values).packed()
            with self._lock:
                plan = self._plans.setdefault(signature, plan)
        return Arena(plan)

    def train(self, mode: bool = True) -> ArenaModule:
        """Refused: there are no gradients in an arena."""
        if mode:
            raise UsageError("a network compiled into an arena only infers: train the original")
        return super().train(mode)
