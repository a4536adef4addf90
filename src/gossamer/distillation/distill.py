"""Distillation through the one training loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

from torch import nn

from gossamer.distillation.losses.twins import OutputLoss
from gossamer.distillation.objective import Distillation
from gossamer.distillation.schedules import Scheduled
from gossamer.errors import UsageError
from gossamer.result import Result
from gossamer.training import FitResult, TrainingOptions, fit

Teachers = nn.Module | Result | Sequence[nn.Module | Result] | None


@overload
def distill(
    student: Result,
    teacher: Teachers,
    data: Iterable[Any],
    *,
    alpha: Scheduled | None = ...,
    tau: Scheduled | None = ...,
    loss: str | OutputLoss | None = ...,
    features: Any = ...,
    teacher_weights: Sequence[float] | None = ...,
    teacher_cache: str | Path | None = ...,
    **options: Unpack[TrainingOptions],
) -> Result: ...
@overload
def distill(
    student: nn.Module,
    teacher: Teachers,
    data: Iterable[Any],
    *,
    alpha: Scheduled | None = ...,
    tau: Scheduled | None = ...,
    loss: str | OutputLoss | None = ...,
    features: Any = ...,
    teacher_weights: Sequence[float] | None = ...,
    teacher_cache: str | Path | None = ...,
    **options: Unpack[TrainingOptions],
) -> FitResult: ...
def distill(
    student: nn.Module | Result,
    teacher: Teachers,
    data: Iterable[Any],
    *,
    alpha: Scheduled | None = None,
    tau: Scheduled | None = None,
    loss: str | OutputLoss | None = "kd",
    features: Any = (),
    teacher_weights: Sequence[float] | None = None,
    teacher_cache: str | Path | None = None,
    **options: Unpack[TrainingOptions],
) -> FitResult | Result:
    """Train a copy of the student on labels and on the teacher's outputs, and on its features where named.

    Examples:
        >>> import torch
        >>> x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> trained = distill(student, teacher, [x] * 10, alpha=1.0, epochs=4, lr=0.1)
        >>> trained.history[-1]["loss"] < trained.history[0]["loss"]
        True

    Args:
        student: a network, or the `Result` of pruning one. Left as it is.
        teacher: a network, the one in a `Result`, or several in a list. They run in eval mode and without gradients, on copies: nothing
            in them changes. None only with ``loss="self"``.
        data: batches as in `gossamer.fit`; labels may be missing with ``alpha=1``.
        alpha: of ``loss="kd"``: weight of the teacher against the labels, in [0, 1]; a schedule such as ``Cosine(1.0, 0.5)`` changes it over the
            training. Default: the loss's own (0.9).
        tau: temperature, above 0, or a schedule. Default: the loss's own (4).
        loss: ``"kd"``, ``"kd_standardized"``, ``"dkd"``, ``"dist"``, ``"nkd"``, ``"self"``, ``"regression"``; or one with settings,
            ``DKD(beta=2.0)``, ``Combined([(KD(), 1.0), (DIST(ce=0), 0.5)])``; None for features alone.
        features: what else to match: names of modules, ``{student: teacher}``, or `Feature` objects with a loss (``"fitnet"``,
            ``"attention"``, ``"similarity"``, ``"rkd"``, ``"channelwise"``) and a weight. Where shapes differ, as in a pruned student, an
            adapter is trained with the student and thrown away.
        teacher_weights: of several teachers' losses; default: all alike, with the sum 1.
        teacher_cache: a folder for the teachers' outputs by sample; they are computed once, whatever the order. For data without
            augmentation.
        **options: of `gossamer.fit`: ``epochs``, ``lr``, ``optimizer``, ``val``, ``checkpoint``, ``resume``, ...; not ``objective``.

    Returns:
        A `gossamer.training.FitResult`; for a `Result`, the `Result` with the trained network in it.

    Raises:
        UsageError: outputs of student and teacher differ in shape, an unknown loss, or an argument outside its range.
        SelectorError: no module has the name of a feature (near names are listed).
        SourceError, RunFolderError: as `gossamer.fit`; also a cache of another teacher's outputs.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531; each loss names its own.
    """
    if "objective" in options:
        raise UsageError("distill has its own objective: use fit for another one")
    objective = Distillation(
        teacher, loss=loss, alpha=alpha, tau=tau, features=features, teacher_weights=teacher_weights, cache=teacher_cache
    )
    return fit(student, data, objective=objective, **options)
