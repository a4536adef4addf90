"""Unstructured pruning: zeros by exact projection or by what calibration data say, in one step or while training."""

from gossamer.projections import block_project, l0_project, l1_project, nm_project
from gossamer.sparsity.criteria import CRITERIA, scores
from gossamer.sparsity.hooks import REGROWTH, SCHEDULES, Projection, Sparsifier
from gossamer.sparsity.reconstruction import reconstruct
from gossamer.sparsity.selection import SCOPES, Pattern, select
from gossamer.sparsity.semi_structured import semi_structured
from gossamer.sparsity.sparsify import sparsify
from gossamer.sparsity.training import lottery_ticket, train_sparse

__all__ = [
    "CRITERIA",
    "REGROWTH",
    "SCHEDULES",
    "SCOPES",
    "Pattern",
    "Projection",
    "Sparsifier",
    "block_project",
    "l0_project",
    "l1_project",
    "lottery_ticket",
    "nm_project",
    "reconstruct",
    "scores",
    "select",
    "semi_structured",
    "sparsify",
    "train_sparse",
]
