"""The one training loop, and what it is made of."""

from gossamer.training.layout import set_layout
from gossamer.training.loop import FitOptions, FitResult, TrainingOptions, fit
from gossamer.training.objectives import Objective, as_objective, cross_entropy
from gossamer.training.optimizers import OPTIMIZERS, lr_factor, make_optimizer
from gossamer.training.penalties import PENALTIES, bn_l1, group_lasso

__all__ = [
    "OPTIMIZERS",
    "PENALTIES",
    "FitOptions",
    "FitResult",
    "Objective",
    "TrainingOptions",
    "as_objective",
    "bn_l1",
    "cross_entropy",
    "fit",
    "group_lasso",
    "lr_factor",
    "make_optimizer",
    "set_layout",
]
