"""The loss as a module: what DDP wraps, so that the network in it keeps its names and adapters train with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gossamer.sources.batches import Batch
from gossamer.training.stepping import check_one

if TYPE_CHECKING:
    from gossamer.training.stepping import Stepper


class LossModule(nn.Module):
    """The objective of a training on its network.

    Args:
        run: network, objective and penalty.
        adapters: trained with the network, or None.
        rank: of this process: what an objective keeps on disk is divided.
    """

    def __init__(self, run: Stepper, adapters: nn.Module | None, rank: int = 0) -> None:
        super().__init__()
        if hasattr(run.objective, "divide"):
            run.objective.divide(rank)
        self.model = run.model
        self.adapters = adapters
        self._run = [run]  # not a module of this one
        self.unused = nn.Parameter(torch.zeros(1, device=run.device))  # DDP warns where it looks for such ones and finds none

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The objective on a batch, and what is minimised: with the penalty."""
        (run,) = self._run
        loss = check_one(run.objective(run.model, batch))
        return loss, loss if run.penalty is None else loss + run.penalty(run.model)
