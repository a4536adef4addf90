"""What a training would cost on many processes."""

from gossamer.parallel.planning.costs import Machine, measured_seconds, predicted_seconds
from gossamer.parallel.planning.plan import Memory, ParallelPlan, Planner, Split, plan_parallel

__all__ = ["Machine", "Memory", "ParallelPlan", "Planner", "Split", "measured_seconds", "plan_parallel", "predicted_seconds"]
