"""Structured pruning: importance, allocation to a target, compensation from calibration data. See README.md."""

from gossamer.pruning.batchnorm import reestimate_batch_norm
from gossamer.pruning.importance import importance_scores
from gossamer.pruning.prune import prune

__all__ = ["importance_scores", "prune", "reestimate_batch_norm"]
