"""Where a training runs. `Placement` itself is one process; `gossamer.parallel` has those of several, which `fit` reaches by this interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.training import checkpoint as checkpoints
from gossamer.training.checkpoint import Parts, Progress
from gossamer.training.feeding import samples_of, seed_epoch
from gossamer.training.validation import figures_of

if TYPE_CHECKING:
    from gossamer.parallel import Parallel
    from gossamer.training.stepping import Stepper


class Placement:
    """A training in one process. The base of all others, which override what differs.

    Attributes:
        first: whether this process writes logs and weights, and draws progress.
        restarted: whether this process was started again in place of one that died: training resumes by itself.
    """

    first = True
    restarted = False

    def on(self, device: torch.device) -> torch.device:
        """The device that this process takes."""
        return device

    def check(self, settings: Mapping[str, Any]) -> None:
        """UsageError for options that do not combine with this placement.

        Args:
            settings: options of `fit` by name.
        """

    def share(self, data: Iterable[Any]) -> Iterable[Any]:
        """What this process reads of batches; there are as many as before."""
        return data

    def seed(self, data: Iterable[Any], seed: int, epoch: int, device: torch.device) -> None:
        """Seed everything random of an epoch, for what `share` returned."""
        seed_epoch(data, seed, epoch, device)

    def wrap(self, run: Stepper, data: Iterable[Any], adapters: nn.Module | None) -> None:
        """Called once with the network, before there is an optimiser: parameters may be replaced by parts of them.

        Args:
            run: ``run.model`` and ``run.forward`` may be replaced.
            data: what `share` returned.
            adapters: trained with the network, or None.
        """

    def learn(self, run: Stepper, raw: Any, reference: int | None, where: str, *, last: bool) -> tuple[float, int]:
        """One forward and one backward pass.

        Args:
            run: how they are made.
            raw: a batch of what `share` returned.
            reference: samples of the first batch of the optimiser step; None: this is it. The gradient's weight is ``samples / reference``.
            where: names the batch, for messages.
            last: whether the optimiser step follows.

        Returns:
            The loss of the whole batch, and its samples, equal in all processes.
        """
        batch = run.prepare(raw)
        n = samples_of(batch)
        loss = run.loss_of(batch, where)
        value = loss.item()
        run.backward(loss, n / (reference or n))
        return value, n

    def clip(self, parameters: list[Tensor], norm: float) -> None:
        """Clip the gradient of all parameters together."""
        torch.nn.utils.clip_grad_norm_(parameters, norm)

    def judge(
        self, run: Stepper, model: nn.Module, raw: Any, metrics: Mapping[str, Callable[[Any, Any], Any]]
    ) -> tuple[dict[str, float], int]:
        """Figures of one validation batch in eval mode, and the samples of it that this process counts."""
        batch = run.prepare(raw)
        return figures_of(run, model, batch, metrics), samples_of(batch)

    def total(self, sums: dict[str, float]) -> dict[str, float]:
        """Sums over all processes that share the data; every process has the same names."""
        return sums

    def any(self, flag: bool) -> bool:
        """Whether any process says yes."""
        return flag

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole state dict of a network, on the CPU, in every process."""
        return {k: v.detach().to(torch.device("cpu"), copy=True) for k, v in model.state_dict().items()}

    def save(self, folder: Path, parts: Parts, progress: Progress, settings: dict[str, Any]) -> None:
        """Write a checkpoint; all processes together."""
        checkpoints.save(folder, parts, progress, settings)

    def restore(self, folder: Path, parts: Parts, settings: dict[str, Any]) -> tuple[Progress, dict[str, Tensor]]:
        """Continue from a checkpoint, written by any placement.

        Returns:
            How far it is, and the states of this process's random generators, ``cpu`` and ``cuda``, where the checkpoint has them.
        """
        progress, generators = checkpoints.restore(folder, parts, settings)
        return progress, generators if "cpu" in generators else {}

    def whole(self, model: nn.Module, rebuild: Callable[[], nn.Module]) -> nn.Module:
        """The trained network as an ordinary one, in every process.

        Args:
            model: in training.
            rebuild: makes a network of the structure that ``model`` had before `wrap`.
        """
        return model


@contextmanager
def placed(parallel: Parallel | None, device: torch.device) -> Iterator[Placement]:
    """The placement that a training asks for, for as long as it is open."""
    if parallel is None:
        yield Placement()
        return
    from gossamer.parallel import place

    with place(parallel, device) as placement:
        yield placement
