"""One epoch: batches into steps, saving and stopping between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import SourceError
from gossamer.training.checkpoint import Progress
from gossamer.training.interruption import StopRequest, TrainingStopped
from gossamer.training.options import ProgressHook
from gossamer.training.stepping import Stepper


@dataclass
class Epoch:
    """Trains for the rest of the epoch that ``state`` is in.

    Attributes:
        run: how a step is made.
        data, batches: what is read, and how many batches an epoch has.
        state: how far the training is; moved on.
        accumulate, every, progress: of `fit`.
        save: writes a checkpoint.
        stop: whether SIGTERM came.
        folder: of checkpoints, or None.
    """

    run: Stepper
    data: Iterable[Any]
    state: Progress
    batches: int
    accumulate: int
    save: Callable[[], None]
    every: int | None
    progress: ProgressHook | None
    stop: StopRequest
    folder: Path | None

    def train(self, generators: dict[str, Tensor], started: float) -> None:
        """Train to the end of the epoch.

        Args:
            generators: states of the random generators where the epoch had begun before an interruption.
            started: when the training would have started without interruptions.

        Raises:
            TrainingStopped: SIGTERM came; the state is saved.
            SourceError: there is no data.
        """
        run, state = self.run, self.state
        run.model.train()
        batches = iter(self.data)
        for _ in range(state.step):  # what was trained on before the interruption
            next(batches)
        if generators:
            torch.set_rng_state(generators["cpu"])
            if "cuda" in generators:
                torch.cuda.set_rng_state(generators["cuda"], run.device)
        steps = -(-self.batches // self.accumulate)
        while raws := list(islice(batches, self.accumulate)):
            first, done = state.step, state.epoch * steps + state.step // self.accumulate
            for loss, n in run.step(raws, done, lambda i, at=first: f"step {at + i + 1} of epoch {state.epoch + 1}"):  # type: ignore[misc]
                state.loss_sum, state.samples = state.loss_sum + loss * n, state.samples + n
            state.step += len(raws)
            state.seconds = time.perf_counter() - started
            made, over = -(-state.step // self.accumulate), state.step >= self.batches
            due = self.every is not None and made % self.every == 0
            stop = self.folder is not None and not over and run.placement.any(self.stop.set)
            if self.folder is not None and not over and (due or stop):
                self.save()
            if self.progress is not None:
                self.progress(min(state.epoch * steps + made, run.total), run.total)
            if stop and self.folder is not None:
                raise TrainingStopped(self.folder)
        if state.samples == 0:
            raise SourceError(f"the data is empty in epoch {state.epoch + 1}: it must be readable again and again")
