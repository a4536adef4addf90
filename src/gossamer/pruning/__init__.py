"""Structured pruning: importance, allocation to a target, compensation from calibration data. See README.md."""

from gossamer.calibration import reestimate_batch_norm
from gossamer.projections import l0_project, l1_project
from gossamer.pruning.importance import importance_scores
from gossamer.pruning.prune import prune
from gossamer.pruning.schedule import SCHEDULES, fractions, prune_in_steps

__all__ = ["SCHEDULES", "fractions", "importance_scores", "l0_project", "l1_project", "prune", "prune_in_steps", "reestimate_batch_norm"]
