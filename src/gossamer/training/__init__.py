"""The one training loop, and what it is made of."""

from gossamer.training.interruption import TrainingStopped
from gossamer.training.layout import set_layout
from gossamer.training.loop import fit
from gossamer.training.metrics import METRICS
from gossamer.training.objectives import OBJECTIVES, Objective, as_objective, cross_entropy
from gossamer.training.optimizers import OPTIMIZERS, lr_factor, make_optimizer, state_bytes
from gossamer.training.options import FitOptions, FitResult, TrainingOptions
from gossamer.training.penalties import PENALTIES, bn_l1, group_lasso
from gossamer.training.rematerialization import MemoryReport, explain_memory

__all__ = [
    "METRICS",
    "OBJECTIVES",
    "OPTIMIZERS",
    "PENALTIES",
    "FitOptions",
    "FitResult",
    "MemoryReport",
    "Objective",
    "TrainingOptions",
    "TrainingStopped",
    "as_objective",
    "bn_l1",
    "cross_entropy",
    "explain_memory",
    "fit",
    "group_lasso",
    "lr_factor",
    "make_optimizer",
    "set_layout",
    "state_bytes",
]
