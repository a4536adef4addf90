"""Inference memory: liveness, an arena, reordering, patches; and a module that runs inside one buffer."""

from gossamer.memory.compiled import ArenaModule
from gossamer.memory.executorch import executorch_memory
from gossamer.memory.plan import MemoryPlan, plan_memory

__all__ = ["ArenaModule", "MemoryPlan", "executorch_memory", "plan_memory"]
