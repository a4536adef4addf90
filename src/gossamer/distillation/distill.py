"""Distillation through the one training loop."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Unpack, overload

import torch
from torch import Tensor, nn

from gossamer.distillation.losses import kd_loss
from gossamer.errors import SourceError, UsageError
from gossamer.result import Result
from gossamer.sources.batches import Batch
from gossamer.training import FitResult, TrainingOptions, fit, set_layout
from gossamer.training.objectives import check_labels, logits_of


class Distillation:
    """`kd_loss` as an objective for `gossamer.fit`. The teacher is a copy, in eval mode for good, and gets no gradients.

    Example:
        >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> objective = Distillation(teacher, alpha=1.0)
        >>> objective(student, Batch((torch.zeros(2, 4),), {}, None)).requires_grad
        True

    Args:
        teacher: takes the same inputs as the student and returns logits of the same shape. Left as it is.
        alpha, tau: of `kd_loss`.

    Raises:
        UsageError: an argument outside its range.
    """

    def __init__(self, teacher: nn.Module, *, alpha: float = 0.9, tau: float = 4.0) -> None:
        kd_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), alpha=alpha, tau=tau)
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.alpha, self.tau = alpha, tau
        self.__name__ = "kd"
        self._channels_last = False

    @property
    def settings(self) -> dict[str, float]:
        """What a resumed training must agree with."""
        return {"alpha": self.alpha, "tau": self.tau}

    def teach(self, batch: Batch) -> Tensor:
        """The teacher's logits, on the device and in the memory layout of the batch."""
        self._follow(batch)
        with torch.no_grad():
            return logits_of(self.teacher(*batch.args, **batch.kwargs))

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        student_NC = logits_of(model(*batch.args, **batch.kwargs))
        teacher_NC = self.teach(batch)
        if student_NC.shape != teacher_NC.shape:
            raise UsageError(
                f"the student returns {tuple(student_NC.shape)} and the teacher {tuple(teacher_NC.shape)}: both must have the same classes"
            )
        labels = batch.target if isinstance(batch.target, Tensor) else None
        if labels is None and self.alpha < 1:
            raise SourceError(f"a batch has no labels, which alpha={self.alpha:g} needs: give (inputs, labels), or use alpha=1")
        if labels is not None and self.alpha < 1:
            check_labels(student_NC, labels)
        return kd_loss(student_NC, teacher_NC, labels, alpha=self.alpha, tau=self.tau)

    def _follow(self, batch: Batch) -> None:
        images = [t for t in (*batch.args, *batch.kwargs.values()) if isinstance(t, Tensor) and t.dim() == 4]
        wanted = any(not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last) for t in images)
        if wanted != self._channels_last:
            set_layout(self.teacher, wanted)
            self._channels_last = wanted
        device = next((t.device for t in (*batch.args, *batch.kwargs.values()) if isinstance(t, Tensor)), None)
        if device is not None and device.type != "cpu":
            self.teacher.to(device)


@overload
def distill(
    student: Result,
    teacher: nn.Module | Result,
    data: Iterable[Any],
    *,
    alpha: float = ...,
    tau: float = ...,
    **options: Unpack[TrainingOptions],
) -> Result: ...
@overload
def distill(
    student: nn.Module,
    teacher: nn.Module | Result,
    data: Iterable[Any],
    *,
    alpha: float = ...,
    tau: float = ...,
    **options: Unpack[TrainingOptions],
) -> FitResult: ...
def distill(
    student: nn.Module | Result,
    teacher: nn.Module | Result,
    data: Iterable[Any],
    *,
    alpha: float = 0.9,
    tau: float = 4.0,
    **options: Unpack[TrainingOptions],
) -> FitResult | Result:
    """Train a copy of the student on labels and on the teacher's outputs.

    Example:
        >>> x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> trained = distill(student, teacher, [x] * 10, alpha=1.0, epochs=4, lr=0.1)
        >>> trained.history[-1]["loss"] < trained.history[0]["loss"]
        True

    Args:
        student: a network, or the `Result` of pruning one. Left as it is.
        teacher: a network, or the one in a `Result`. It runs in eval mode and without gradients, on a copy: nothing in it changes.
        data: batches as in `gossamer.fit`; labels may be missing with ``alpha=1``.
        alpha: weight of the teacher against the labels, in [0, 1].
        tau: temperature, above 0.
        **options: of `gossamer.fit`: ``epochs``, ``lr``, ``optimizer``, ``val``, ``checkpoint``, ``resume``, ...; not ``objective``.

    Returns:
        A `gossamer.training.FitResult`; for a `Result`, the `Result` with the trained network in it.

    Raises:
        UsageError: outputs of student and teacher differ in shape, or an argument is outside its range.
        SourceError, RunFolderError: as `gossamer.fit`.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """
    if "objective" in options:
        raise UsageError("distill has its own objective: use fit for another one")
    objective = Distillation(teacher.model if isinstance(teacher, Result) else teacher, alpha=alpha, tau=tau)
    return fit(student, data, objective=objective, **options)
