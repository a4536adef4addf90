"""Gradient checkpointing under a budget: what a step takes, what to compute twice, and proof of the peak."""

from gossamer.training.rematerialization.explain import explain_memory
from gossamer.training.rematerialization.planning import plan_memory
from gossamer.training.rematerialization.recompute import recomputing
from gossamer.training.rematerialization.report import BlockMemory, MemoryReport

__all__ = ["BlockMemory", "MemoryReport", "explain_memory", "plan_memory", "recomputing"]
